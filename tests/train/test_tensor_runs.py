"""Runs whose layers are cut along the tensor axis, compared with runs on one rank."""

import io
import json
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import LayoutError, RecipeError
from mpillm.machine.cluster_profile import (
    ClusterProfile,
    Cost,
    PointToPointCost,
    describe_cluster,
)
from mpillm.machine.node_map import NodeMap
from mpillm.system.console import Console
from mpillm.train.dry_run import Hosts, print_dry_run
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import metrics, whole_tensors

pytestmark = pytest.mark.slow("trains whole runs, one for each layout")

QUIET = Console(speaks=False)
STEPS = 10
# Twelve heads for 2, 3 and 4 ranks; 3 divide neither the heads of keys nor the hidden features.
LLAMA = {"layers": 4, "width": 48, "heads": 12, "kv_heads": 4, "context": 24, "hidden": 100}
LLAMA["vocab_size"] = 260
GPT2 = {
    "layers": 4,
    "width": 48,
    "heads": 12,
    "context": 24,
    "hidden": 90,
    "bias": True,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
}


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": LLAMA,
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "train": {"run": str(run), "sinks": [], "steps": STEPS, "batch": 12},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def check_equal(run: Path, alone: Path, far: float) -> None:
    for keys in (("loss", "grad_norm"), ("validation_loss",)):
        expected, found = metrics(alone, *keys), metrics(run, *keys)
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=far)


def llama_layouts(ranks: int) -> list[dict[str, dict[str, object]]]:
    """List layouts of `ranks` ranks: sections of a recipe."""
    tensor = {"parallel": {"tensor": ranks}}
    # A row at a time: the stream is shared out by positions.
    by_positions: dict[str, dict[str, object]] = {**tensor, "train": {"microbatch": 1}}
    if ranks < 4:
        return [by_positions, {**tensor, "train": {"recompute": "full"}}]
    return [
        by_positions,
        {"parallel": {"tensor": 2, "data": 2, "zero": 3}},
        {"parallel": {"tensor": 2, "pipeline": 2, "schedule": "zb-v"}},
    ]


def test_llamas_have_the_losses_of_one_rank(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    if comm.rank == 0:
        train(recipe(data, folder / "alone"), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, sections in enumerate(llama_layouts(comm.size)):
        run = folder / f"run{number}"
        train(recipe(data, run, **sections), comm, QUIET)
        check_equal(run, folder / "alone", 1e-4)


def test_gpt2s_have_the_losses_of_one_rank_by_messages(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    if comm.rank == 0:
        train(recipe(data, folder / "alone", model=GPT2), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    apart = NodeMap(tuple((rank,) for rank in range(comm.size)))
    network = PointToPointCost("network", Cost((), 1e-4, 1e8, 0.1))
    here, profile = describe_cluster(comm, apart), folder / "profile.json"
    if comm.rank == 0:
        ClusterProfile("2026-11-30", here, point_to_point=(network,)).save(profile)
    comm.Barrier()
    parallel = {"tensor": comm.size, "profile": str(profile)}
    made = recipe(data, folder / "run", model=GPT2, parallel=parallel)
    printed = io.StringIO()
    train(made, comm, Console(comm.rank == 0, printed), node_map=apart)
    check_equal(folder / "run", folder / "alone", 1e-4)
    hosts, dry = Hosts.of_job([f"h{rank}" for rank in range(comm.size)], apart), io.StringIO()
    print_dry_run(made, hosts, Console(stream=dry), as_json=True)
    (note,) = (note for note in json.loads(dry.getvalue())["notes"] if "s a step" in note)
    assert note.startswith(f"parallel.tensor = {comm.size} is on {comm.size} hosts")
    assert printed.getvalue().count(f"warning: {note}") == (comm.rank == 0)


def test_bfloat16_is_as_near_as_it_rounds(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    half = {"dtype": "bfloat16", "steps": 5}
    if comm.rank == 0:
        train(recipe(data, folder / "alone", train=half), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    train(recipe(data, folder / "run", train=half, parallel={"tensor": comm.size}), comm, QUIET)
    check_equal(folder / "run", folder / "alone", 2e-2)


def test_any_layout_reads_the_checkpoint_of_any(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Whole weights keep their bits from many ranks to one and back."""
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    many, one, again = (folder / name for name in ("many", "one", "again"))
    cut = {"tensor": comm.size}
    # Without padding, though 2, 3 and 4 do not divide it.
    odd = {"vocab_size": 259}
    train(recipe(data, many, model=odd, train={"steps": 3}, parallel=cut), comm, QUIET)
    # A rate that changes no bit.
    idle = {"learning_rate": 1e-30}
    if comm.rank == 0:
        start = {"steps": 1, "start_from": str(many)}
        train(recipe(data, one, model=odd, train=start, optimizer=idle), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    start = {"steps": 1, "start_from": str(one)}
    train(recipe(data, again, model=odd, train=start, optimizer=idle, parallel=cut), comm, QUIET)
    expected = whole_tensors(many, comm)
    weights = [name for name in expected if name.startswith("model/")]
    assert expected["model/embedding/weight"].shape == (259, 48)
    for run in (one, again):
        found = whole_tensors(run, comm)
        assert all(torch.equal(found[name], expected[name]) for name in weights)


@pytest.mark.parametrize("cut_first", [True, False])
def test_a_run_continues_under_another_layout(
    data: Path, folder: Path, comm: MPI.Intracomm, cut_first: bool
) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    steady = {"schedule": "constant-then-decay", "decay_share": 0.0}
    halves = folder / "halves"
    if comm.rank == 0:
        train(recipe(data, folder / "alone", optimizer=steady), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for steps, is_cut in ((5, cut_first), (STEPS, not cut_first)):
        parallel = {"tensor": comm.size} if is_cut else {}
        half = recipe(data, halves, train={"steps": steps}, optimizer=steady, parallel=parallel)
        if is_cut or comm.rank == 0:
            train(half, comm if is_cut else MPI.COMM_SELF, QUIET, resume=steps == STEPS)
        comm.Barrier()
    expected, found = (metrics(run, "loss") for run in (folder / "alone", halves))
    assert [loss for (loss,) in found] == pytest.approx([loss for (loss,) in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"train": {"fixed_order": True, "microbatch": 1}}, LayoutError, "fixed_order"),
        ({"train": {"compile": True}}, RecipeError, "compile"),
        ({"train": {"noise_scale": 2, "microbatch": 1}}, RecipeError, "noise_scale"),
        ({"optimizer": {"name": "muon"}}, LayoutError, "whole weights"),
        ({"model": {"heads": 11, "kv_heads": 11, "head_width": 4}}, LayoutError, "11 heads"),
        ({"model": {"experts": 2}}, LayoutError, "experts"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    sections: dict[str, dict[str, object]],
    kind: type[Exception],
    words: str,
) -> None:
    if comm.size == 1:
        pytest.skip("an axis of one rank cuts nothing")
    parallel = {"tensor": comm.size, **sections.get("parallel", {})}
    given = recipe(data, folder / "run", **{**sections, "parallel": parallel})
    with pytest.raises(kind, match=words):
        train(given, comm, QUIET)
