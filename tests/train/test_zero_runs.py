"""Runs whose gradients, states and weights are in shards, compared with runs on one rank."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap
from mpillm.system.compile_cache import find_compiler
from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import numbers, whole_tensors

QUIET = Console(speaks=False)
STEPS = 4

pytestmark = pytest.mark.slow("trains whole runs, one for each layout")


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    """A model whose matrices have several pieces of the norm; a batch that 1 to 4 ranks divide."""
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 192, "heads": 2, "context": 16},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"run": str(run), "sinks": [], "steps": STEPS, "batch": 12, "evaluate_every": 2},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def check_equal(run: Path, other: Path, comm: MPI.Intracomm, what: object) -> None:
    assert numbers(run) == numbers(other), what
    one, two = whole_tensors(run, comm), whole_tensors(other, comm)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == [], what


def layouts(ranks: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"zero": stage} for stage in (1, 2, 3)]
    return found + ([{"zero": 3, "pipeline": 2}] if ranks % 2 == 0 and ranks > 2 else [])


FIXED = {"fixed_order": True, "microbatch": 1, "batch": 8}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_shards_have_the_bits_of_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm, optimizer: str
) -> None:
    # A data rank takes a power of two of microbatches.
    changes = {"train": FIXED | {"batch": 12 if comm.size == 3 else 8}}
    changes["optimizer"] = {"name": optimizer}
    if comm.rank == 0:
        train(recipe(data, folder / "alone", **changes), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, parallel in enumerate(layouts(comm.size)):
        run = folder / f"run{number}"
        train(recipe(data, run, **changes, parallel=parallel), comm, QUIET)
        check_equal(run, folder / "alone", comm, parallel)


def gathered_layouts(ranks: int) -> list[dict[str, dict[str, object]]]:
    full: dict[str, object] = {"recompute": "full"}
    if ranks < 4:
        return [{}, {"train": full}]
    # A backward pass in halves, and the tied weight on one rank of the pipeline.
    return [{"parallel": {"pipeline": 2, "schedule": "zb-v"}, "train": full}]


def test_ranks_that_share_no_memory_have_the_bits_of_one(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Each rank is a host of its own: the weights are gathered layer by layer."""
    fixed = FIXED | {"batch": 12 if comm.size == 3 else 8}
    deep = {"layers": 4, "width": 32}
    if comm.rank == 0:
        train(recipe(data, folder / "alone", model=deep, train=fixed), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, layout in enumerate(gathered_layouts(comm.size)):
        run, parallel = folder / f"run{number}", {"zero": 3, **layout.get("parallel", {})}
        given = fixed | layout.get("train", {})
        own = recipe(data, run, model=deep, train=given, parallel=parallel)
        train(own, comm, QUIET, node_map=apart(comm))
        check_equal(run, folder / "alone", comm, layout)


def apart(comm: MPI.Intracomm) -> NodeMap:
    return NodeMap(tuple((rank,) for rank in range(comm.size)))


def test_compiled_layers_are_not_gathered(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to gather")
    if not find_compiler():
        pytest.skip("needs a C++ compiler")
    given = recipe(data, folder / "run", train={"compile": True}, parallel={"zero": 3})
    with pytest.raises(LayoutError, match=r"layer by layer.*train\.compile.*parallel\.zero = 2"):
        train(given, comm, QUIET, node_map=apart(comm))


def test_a_run_resumes_in_another_layout(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    """Half of the steps with each: the files hold whole tensors, whatever layout wrote them."""
    fixed = {"train": FIXED | {"batch": 12 if comm.size == 3 else 8, "save_every": 2}}
    train(recipe(data, folder / "alone", **fixed), comm, QUIET)
    for first, then in ((3, 0), (0, 3), (3, 1), (2, 3)):
        run = folder / f"run{first}{then}"
        half = {"train": fixed["train"] | {"steps": 2}}
        # The schedule of a shorter run falls earlier: a constant rate has no such end.
        constant = {"schedule": "constant-then-decay", "decay_share": 0.0}
        whole_run = folder / "constant"
        if first == 3 and then == 0:
            train(recipe(data, whole_run, **fixed, optimizer=constant), comm, QUIET)
        train(recipe(data, run, **half, optimizer=constant, parallel={"zero": first}), comm, QUIET)
        longer = recipe(data, run, **fixed, optimizer=constant, parallel={"zero": then})
        train(longer, comm, QUIET, resume=True)
        check_equal(run, whole_run, comm, (first, then))


def test_masters_of_bfloat16_are_shards(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    low = {"train": {"dtype": "bfloat16", "microbatch": 2}}
    train(recipe(data, folder / "whole", **low), comm, QUIET)
    expected = [value for line in numbers(folder / "whole") for value in line]
    for stage in (1, 3):
        run = folder / f"run{stage}"
        train(recipe(data, run, **low, parallel={"zero": stage}), comm, QUIET)
        found = [value for line in numbers(run) for value in line]
        assert found == pytest.approx(expected, rel=2e-3), stage


def test_a_run_starts_from_a_checkpoint_of_whole_weights(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    fixed = {"train": FIXED | {"batch": 12 if comm.size == 3 else 8}}
    train(recipe(data, folder / "first", **fixed), comm, QUIET)
    start = fixed["train"] | {"start_from": str(folder / "first")}
    for stage in (0, 3):
        run = folder / f"run{stage}"
        train(recipe(data, run, train=start, parallel={"zero": stage}), comm, QUIET)
    check_equal(folder / "run3", folder / "run0", comm, "start_from")


def test_the_noise_scale_needs_whole_gradients(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    given = recipe(
        data,
        folder / "run",
        train={"noise_scale": 2, "microbatch": 1},
        parallel={"zero": 2},
    )
    with pytest.raises(LayoutError, match=r"noise_scale .* parallel\.zero = 2 .*zero = 0"):
        train(given, comm, QUIET)
