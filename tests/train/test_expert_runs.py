"""Runs whose experts are shared out, compared with runs on one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import numbers, whole_tensors

QUIET = Console(speaks=False)
STEPS = 10
LINES = STEPS + 2
RESIDUE = 1e-5
"""Of float32: sums of the tokens of several ranks are in another order."""

pytestmark = pytest.mark.slow("trains whole runs, one for each layout")

MIXTURES: dict[str, dict[str, object]] = {
    "plain": {},
    "shared, balanced": {"shared_hidden": 16, "shared_gate": True, "balance_loss": 0.05},
}


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    """Eight experts of which two are chosen; six at three ranks, which must divide them."""
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 16, "hidden": 24, "experts": 8},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"run": str(run), "sinks": [], "steps": STEPS, "batch": 12, "evaluate_every": 5},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def of_ranks(comm: MPI.Intracomm) -> dict[str, object]:
    return {"experts": 6 if comm.size == 3 else 8}


def needs_ranks(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to share out")


def check_near(run: Path, other: Path, what: object, rel: float = RESIDUE) -> None:
    found, expected = numbers(run), numbers(other)
    assert len(found) == len(expected), what
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=rel), what


def layouts(ranks: int) -> list[dict[str, Any]]:
    """List the layouts of so many ranks, each with what it composes with."""
    found: list[dict[str, Any]] = [
        {"parallel": {"experts": ranks}},
        {"parallel": {"experts": ranks, "zero": 3}, "train": {"recompute": "full"}},
    ]
    by_messages = {"experts": 2, "pipeline": 2, "handover": "messages"}
    if ranks == 4:
        found += [
            {"parallel": {"experts": 2, "pipeline": 2, "schedule": "zb-h1"}},
            {"parallel": {"experts": 2}, "optimizer": {"name": "muon"}},
            {"parallel": {"experts": 2, "zero": 1}, "train": {"microbatch": 1}},
            {"parallel": by_messages, "train": {"recompute": 2}},
        ]
    return found


@pytest.mark.parametrize("mixture", MIXTURES)
def test_each_layout_trains_as_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm, mixture: str
) -> None:
    needs_ranks(comm)
    model = {**of_ranks(comm), **MIXTURES[mixture]}
    every, alone = layouts(comm.size), dict[str, Path]()
    # Each layout once.
    chosen = every if comm.size < 4 else every[list(MIXTURES).index(mixture) :: len(MIXTURES)]
    for number, sections in enumerate(chosen):
        optimizer = sections.get("optimizer", {})
        name = optimizer.get("name", "adamw")
        if name not in alone:
            alone[name] = folder / f"alone-{name}"
            if comm.rank == 0:
                single = recipe(data, alone[name], model=model, optimizer=optimizer)
                train(single, MPI.COMM_SELF, QUIET)
            comm.Barrier()
        run = folder / f"run{number}"
        train(recipe(data, run, model=model, **sections), comm, QUIET)
        check_near(run, alone[name], sections)
        assert len(numbers(run)) == LINES


@pytest.mark.ranks(2, 4)
def test_ranks_that_share_sequences_may_share_experts(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    few: dict[str, object] = {"steps": 4, "evaluate_every": 2}
    given: dict[str, dict[str, object]] = {"model": of_ranks(comm), "train": few}
    parallel: dict[str, object] = {"context": 2}
    for number, experts in enumerate((1, comm.size)):
        layout = {"experts": experts, **parallel}
        train(recipe(data, folder / f"run{number}", **given, parallel=layout), comm, QUIET)
    check_near(folder / "run1", folder / "run0", "context")


def test_a_run_resumes_in_another_layout(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    """Half of the steps with each: the files hold whole tensors, whatever layout wrote them."""
    needs_ranks(comm)
    constant = {"schedule": "constant-then-decay", "decay_share": 0.0}
    few: dict[str, object] = {"steps": 4, "evaluate_every": 2}
    given = {"model": of_ranks(comm), "optimizer": constant}
    train(recipe(data, folder / "whole", **given, train=few), comm, QUIET)
    each: list[dict[str, object]] = [{"experts": comm.size}, {}, {"experts": comm.size, "zero": 3}]
    if comm.size == 4:
        each[0] = {"experts": 2, "pipeline": 2}
    for number, first in enumerate(each):
        then, run = each[number - 1], folder / f"run{number}"
        half = few | {"steps": 2, "save_every": 2}
        train(recipe(data, run, **given, parallel=first, train=half), comm, QUIET)
        train(recipe(data, run, **given, parallel=then, train=few), comm, QUIET, resume=True)
        check_near(run, folder / "whole", (first, then))
        one, two = whole_tensors(run, comm), whole_tensors(folder / "whole", comm)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-4), (name, first, then)


def test_masters_of_bfloat16(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    needs_ranks(comm)
    few = {"steps": 3, "evaluate_every": 0}
    low = {"model": of_ranks(comm), "train": {"dtype": "bfloat16", "microbatch": 6, **few}}
    train(recipe(data, folder / "whole", **low), comm, QUIET)
    for number, zero in enumerate((0, 2)):
        run = folder / f"run{number}"
        parallel = {"experts": comm.size, "zero": zero}
        train(recipe(data, run, **low, parallel=parallel), comm, QUIET)
        check_near(run, folder / "whole", parallel, rel=1e-2)


@pytest.mark.ranks(4)
def test_islands_have_experts_of_their_own(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    for number, experts in enumerate((1, 2)):
        parallel = {"island": 2, "island_every": 5, "experts": experts}
        train(recipe(data, folder / f"run{number}", parallel=parallel), comm, QUIET)
    check_near(folder / "run1", folder / "run0", "islands")


def test_a_layout_that_does_not_fit_is_refused_ahead_of_the_run(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    given = recipe(data, folder / "run", parallel={"experts": 5})
    with pytest.raises(LayoutError, match=r"parallel\.experts = 5 must divide the .*; take 1"):
        train(given, comm, QUIET)
    fixed: dict[str, object] = {"fixed_order": True, "microbatch": 1, "batch": 4 * comm.size}
    given = recipe(
        data,
        folder / "run",
        model=of_ranks(comm),
        train=fixed,
        parallel={"experts": comm.size},
    )
    if comm.size > 1:
        with pytest.raises(LayoutError, match=r"fixed_order .*parallel\.experts"):
            train(given, comm, QUIET)
    assert not (folder / "run").exists()
