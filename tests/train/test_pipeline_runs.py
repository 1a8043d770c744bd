"""Runs whose layers are shared out, compared with runs on one rank."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.generate import generate
from mpillm.infer.loading import load_trained
from mpillm.infer.sampling import Sampling
from mpillm.system.console import Console
from mpillm.tokens.reader import open_split
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import hashes, metrics

QUIET = Console(speaks=False)
# tests/train/test_train.py compares fifty.
STEPS = 20

pytestmark = pytest.mark.slow("trains whole runs, one for each layout")


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 8, "width": 16, "heads": 2, "context": 24},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "train": {
            "run": str(run),
            "sinks": [],
            "steps": STEPS,
            "batch": 8,
            "microbatch": 1,
            "fixed_order": True,
        },
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def layouts(ranks: int) -> list[dict[str, object]]:
    """List layouts of a pipeline on `ranks` ranks."""
    found: list[dict[str, object]] = [{"pipeline": ranks}, {"pipeline": ranks, "schedule": "zb-v"}]
    return found + ([{"pipeline": 2, "data": 2}] if ranks == 4 else [])


def test_a_pipeline_has_the_bits_of_one_rank(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    alone = folder / "alone"
    if comm.rank == 0:
        train(recipe(data, alone), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, parallel in enumerate(layouts(comm.size)):
        run = folder / f"run{number}"
        train(recipe(data, run, parallel=parallel), comm, QUIET)
        assert metrics(run, "loss", "grad_norm") == metrics(alone, "loss", "grad_norm"), parallel
        assert metrics(run, "validation_loss") == metrics(alone, "validation_loss"), parallel
        assert hashes(run, comm) == hashes(alone, comm), parallel
        assert len(metrics(run, "loss")) == STEPS


def test_without_a_fixed_order_losses_agree_within_rounding(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    alone, free = folder / "alone", {"fixed_order": False}
    if comm.rank == 0:
        train(recipe(data, alone, train=free), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    for number, parallel in enumerate(layouts(comm.size)):
        run = folder / f"run{number}"
        train(recipe(data, run, train=free, parallel=parallel), comm, QUIET)
        expected = [loss for (loss,) in metrics(alone, "loss")]
        assert [loss for (loss,) in metrics(run, "loss")] == pytest.approx(expected, rel=1e-5)


def test_a_run_continues_under_another_layout(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Half the steps on one rank, half in a pipeline, bit for bit as if nothing had changed."""
    whole, halves = folder / "whole", folder / "halves"
    steady = {"schedule": "constant-then-decay", "decay_share": 0.0}
    if comm.rank == 0:
        train(recipe(data, whole, train={"steps": 12}, optimizer=steady), MPI.COMM_SELF, QUIET)
        train(recipe(data, halves, train={"steps": 6}, optimizer=steady), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    parallel = {"pipeline": comm.size, "schedule": "interleaved"}
    train(
        recipe(data, halves, train={"steps": 12}, optimizer=steady, parallel=parallel),
        comm,
        QUIET,
        resume=True,
    )
    assert metrics(halves, "loss", "grad_norm") == metrics(whole, "loss", "grad_norm")
    assert hashes(halves, comm) == hashes(whole, comm)


def test_a_pipeline_s_checkpoint_serves_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    train(recipe(data, run, train={"steps": 5}, parallel={"pipeline": comm.size}), comm, QUIET)
    loaded = load_trained(run, comm, QUIET)
    with open_split(data, "validation") as reader:
        score = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
    assert [[score.loss]] == metrics(run, "validation_loss")
    text = "".join(generate(loaded.model, loaded.tokenizer, "tion", Sampling(max_tokens=20)))
    assert comm.allgather(text) == [text] * comm.size


def test_a_trace_shows_every_rank_and_action(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    run = folder / "run"
    train(
        recipe(data, run, train={"steps": 3}, parallel={"pipeline": comm.size}),
        comm,
        QUIET,
        trace=True,
    )
    trace = json.loads((run / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    tracks = {
        event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"
    }
    assert tracks == {rank: f"rank {rank} (data 0, pipeline {rank})" for rank in range(comm.size)}
    named = {(event["tid"], event["args"]["step"], event["name"]) for event in events}
    for rank in range(comm.size):
        for step in (1, 2, 3):
            wanted = {f"{rank}{kind}{microbatch}" for kind in "FB" for microbatch in range(8)}
            assert {(rank, step, name) for name in wanted | {"read", "reduce", "update"}} <= named
    # On one clock: a stage begins a microbatch when the stage before has ended it.
    ends = {(event["args"]["step"], event["name"]): event["ts"] + event["dur"] for event in events}
    for event in events:
        stage, microbatch = event["tid"], event["name"].partition("F")[2]
        if "F" in event["name"] and stage:
            assert event["ts"] >= ends[event["args"]["step"], f"{stage - 1}F{microbatch}"]
    if comm.size > 1:
        assert all(bubble > 0 for (bubble,) in metrics(run, "bubble"))


def test_a_mask_of_documents_reaches_every_stage(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    masked = {"path": str(data), "document_mask": True}
    for name, ranks, parallel in (
        ("alone", MPI.COMM_SELF, {}),
        ("run", comm, {"pipeline": comm.size}),
    ):
        if comm.rank == 0 or name == "run":
            train(
                recipe(data, folder / name, data=masked, train={"steps": 4}, parallel=parallel),
                ranks,
                QUIET,
            )
        comm.Barrier()
    assert metrics(folder / "run", "loss") == metrics(folder / "alone", "loss")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"pipeline": 7}}, "parallel.pipeline = 7 must divide the ranks"),
        ({"parallel": {"schedule": "zb-w", "pipeline": 0}}, "pipeline"),
        ({"train": {"microbatch": 0, "batch": 12}}, "train.fixed_order sums by microbatch"),
    ],
)
def test_impossible_layouts_are_refused_before_there_is_a_folder(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    sections: dict[str, dict[str, object]],
    words: str,
) -> None:
    with pytest.raises((LayoutError, ValueError), match=words):
        train(recipe(data, folder / "run", **sections), comm, QUIET)
    assert not (folder / "run").exists()
