"""Whole runs, through the library and through the command line, at any number of ranks."""

import io
import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import (
    DataError,
    DivergedError,
    LayoutError,
    MismatchError,
    StoppedError,
    UsageError,
)
from mpillm.launch.signals import StopSignals
from mpillm.machine.cluster_profile import ClusterProfile, CollectiveCost, Cost, describe_cluster
from mpillm.system.console import Console
from mpillm.train.loop import JobLimits
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from mpillm.weights.finding import find

QUIET = Console(speaks=False)
TIMES = ("step_seconds", "tokens_per_second", "memory_bytes", "data_seconds", "pipeline_seconds")


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 2, "width": 32, "heads": 4, "context": 32},
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "train": {"run": str(run), "steps": 12, "batch": 12},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def untimed(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run)]


def same_weights(one: Path, other: Path, comm: MPI.Intracomm) -> bool:
    hashes = [
        {
            name: [piece.xxh3_128 for piece in entry.pieces]
            for name, entry in find(run, comm, QUIET).tensors.items()
        }
        for run in (one, other)
    ]
    return hashes[0] == hashes[1]


def test_losses_are_those_of_one_process(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    settings = {"train": {"steps": 50, "microbatch": 4}}
    train(recipe(data, folder / "all", **settings), comm, QUIET)
    if comm.rank == 0:
        train(recipe(data, folder / "one", **settings), MPI.COMM_SELF, QUIET)
        together, alone = losses_of(folder / "all"), losses_of(folder / "one")
        assert len(alone) == 50
        assert together == pytest.approx(alone, rel=1e-5)
        assert alone[-1] < 0.8 * alone[0]


def test_the_recorded_loss_is_the_objective_and_a_validation_loss_is_plain(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    """Label smoothing and z-loss change the training, with the same losses at any ranks."""
    task = {"label_smoothing": 0.2, "z_loss": 1e-3}
    short, still = {"steps": 3}, {"learning_rate": 1e-9}
    train(recipe(data, folder / "all", task=task, train=short), comm, QUIET)
    if comm.rank == 0:
        train(recipe(data, folder / "one", task=task, train=short), MPI.COMM_SELF, QUIET)
        assert losses_of(folder / "all") == pytest.approx(losses_of(folder / "one"), rel=1e-5)
        for name, terms in (("plain", {}), ("terms", task)):
            run = recipe(data, folder / name, task=terms, optimizer=still, train=short)
            train(run, MPI.COMM_SELF, QUIET)
        plain, terms = losses_of(folder / "plain"), losses_of(folder / "terms")
        # At the initial weights log Z is about log V, and smoothing changes little.
        assert terms[0] - plain[0] == pytest.approx(1e-3 * math.log(257) ** 2, abs=0.01)
        validation = [metrics(folder / name)[-1]["validation_loss"] for name in ("plain", "terms")]
        assert validation[0] == pytest.approx(validation[1], rel=1e-6)


@pytest.mark.slow("trains whole runs")
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    whole = {"train": {"save_every": 5, "evaluate_every": 4}}
    train(recipe(data, folder / "whole", **whole), comm, QUIET)
    # The same run, cut short after step 7 (its newest checkpoint is of step 5), then resumed.
    train(recipe(data, folder / "cut", **whole), comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        for newer in ("step-00000010", "step-00000012"):
            (folder / "cut/checkpoints" / newer).rename(folder / newer)
        lines = (folder / "cut/metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "cut/metrics.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    comm.Barrier()
    train(recipe(data, folder / "cut", **whole), comm, QUIET, resume=True)
    assert untimed(folder / "cut") == untimed(folder / "whole")
    assert same_weights(folder / "cut", folder / "whole", comm)


class Asked(StopSignals):
    """A signal that reached one rank before the run began."""

    def __init__(self, here: bool) -> None:
        self.number, self._orderly = signal.SIGUSR1 * here, False


@pytest.mark.slow("trains whole runs")
def test_a_stop_leaves_out_nothing_that_was_due(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    table = {"train": {"evaluate_every": 1, "steps": 3}}
    train(recipe(data, folder / "whole", **table), comm, QUIET)
    stops = recipe(data, folder / "cut", **table)
    for step in (1, 2):
        asked = JobLimits(Asked(comm.rank == comm.size - 1))
        words = rf"SIGUSR1 on rank {comm.size - 1}; the run is saved as .*step-0000000{step}"
        with pytest.raises(StoppedError, match=words):
            train(stops, comm, QUIET, resume=step > 1, limits=asked)
    train(stops, comm, QUIET, resume=True)
    assert untimed(folder / "cut") == untimed(folder / "whole")
    assert same_weights(folder / "cut", folder / "whole", comm)


@pytest.mark.slow("trains whole runs")
def test_a_damaged_newest_checkpoint_is_passed_over(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    settings = {"train": {"save_every": 6}}
    for name in ("whole", "hurt"):
        train(recipe(data, folder / name, **settings), comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        file = folder / "hurt/checkpoints/step-00000012/rank-00000.h5"
        file.write_bytes(file.read_bytes()[:1000])
    comm.Barrier()
    train(recipe(data, folder / "hurt", **settings), comm, QUIET, resume=True)
    assert untimed(folder / "hurt") == untimed(folder / "whole")
    assert same_weights(folder / "hurt", folder / "whole", comm)


def test_a_run_leaves_what_people_look_for(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    run = folder / "run"
    train(recipe(data, run, train={"evaluate_every": 6, "save_every": 4, "keep": 2}), comm, QUIET)
    steps = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    wanted = {
        "step",
        "loss",
        "tokens",
        "tokens_per_second",
        "learning_rate",
        "grad_norm",
        "step_seconds",
    }
    assert set(steps[0]) == wanted | {"memory_bytes"} | (
        {"data_seconds"} if comm.size > 1 else set()
    )
    assert 2**20 < steps[0]["memory_bytes"] < 2**36
    assert steps[-1]["tokens"] == 12 * 12 * 32
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [6, 12]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert "learning_rate = 0.003" in (run / "recipe.toml").read_text()


@pytest.mark.slow("trains whole runs")
def test_the_document_mask_trains_otherwise(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    for name, mask in (("plain", False), ("masked", True)):
        table = {"train": {"steps": 3}, "data": {"document_mask": mask}, "model": {"context": 256}}
        train(recipe(data, folder / name, **table), comm, QUIET)
    plain, masked = metrics(folder / "plain"), metrics(folder / "masked")
    assert plain[-2]["loss"] == pytest.approx(masked[-2]["loss"], rel=0.05)
    assert plain[-2]["loss"] != masked[-2]["loss"]


# Lower dtypes are slow on CPUs.
@pytest.mark.ranks(1, 2)
@pytest.mark.slow("trains whole runs")
def test_a_lower_dtype_learns_as_float32_does(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        settings = {"train": {"dtype": dtype, "steps": 50, "microbatch": 6}}
        train(recipe(data, folder / dtype, **settings), comm, QUIET)
    whole = losses_of(folder / "float32")
    for dtype in ("bfloat16", "float16"):
        losses = losses_of(folder / dtype)
        assert losses != whole
        assert losses[-1] == pytest.approx(whole[-1], rel=0.01)


@pytest.mark.slow("trains whole runs")
@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_resumed_run_of_a_lower_dtype_is_bitwise_the_uninterrupted_one(
    data: Path, folder: Path, comm: MPI.Intracomm, dtype: str
) -> None:
    settings = {"dtype": dtype, "save_every": 4}
    train(recipe(data, folder / "whole", train={**settings, "steps": 8}), comm, QUIET)
    again = recipe(data, folder / "again", train={**settings, "steps": 8})
    train(again, comm, QUIET)
    assert same_weights(folder / "whole", folder / "again", comm)
    checkpoint = folder / "again/checkpoints/step-00000008"
    if comm.rank == 0:
        shutil.rmtree(checkpoint)
    comm.Barrier()
    train(again, comm, QUIET, resume=True)
    assert same_weights(folder / "whole", folder / "again", comm)
    dtypes = {entry.dtype for entry in find(folder / "again", comm, QUIET).tensors.values()}
    assert dtypes == {"float32"}


@pytest.mark.slow("trains whole runs")
def test_the_dtype_of_sums_is_a_setting(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    for name in ("float32", "bfloat16"):
        settings = {"train": {"reduce_dtype": name}}
        train(recipe(data, folder / name, **settings), comm, QUIET)
    whole, lower = losses_of(folder / "float32"), losses_of(folder / "bfloat16")
    assert lower == pytest.approx(whole, rel=1e-2)
    assert (lower == whole) == (comm.size == 1)


@pytest.mark.slow("trains whole runs")
def test_a_step_that_overflows_float16_is_computed_again(
    data: Path, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpillm.train.loss_scale.FIRST", 2.0**24)
    settings = {"train": {"dtype": "float16", "steps": 4}}
    train(recipe(data, folder / "run", **settings), comm, QUIET)
    lines = [line for line in metrics(folder / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["repeats"] > 0
    assert lines[0]["loss_scale"] == 2.0 ** (24 - lines[0]["repeats"])
    assert all(line["grad_norm"] < 100 for line in lines)
    monkeypatch.undo()
    train(recipe(data, folder / "low", **settings), comm, QUIET)
    assert losses_of(folder / "low") == pytest.approx(losses_of(folder / "run"), rel=1e-3)


def test_float16_that_overflows_at_any_scale_is_named(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    settings = {
        "train": {"dtype": "float16", "steps": 20},
        "optimizer": {"learning_rate": 300.0, "warmup_steps": 0, "clip": 0.0},
    }
    with pytest.raises(DivergedError, match=r"in float16 .* --set train.dtype=bfloat16"):
        train(recipe(data, folder / "run", **settings), comm, QUIET)


def test_a_diverging_run_names_step_and_checkpoint(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    train(recipe(data, folder / "run", train={"steps": 4}), comm, QUIET)
    wild = {"train": {"steps": 30}, "optimizer": {"learning_rate": 1e30, "clip": 0.0}}
    with pytest.raises(
        DivergedError,
        match=r"at step \d+ .*(rank|ranks).* the last good checkpoint is .*step-00000004",
    ):
        train(recipe(data, folder / "run", **wild), comm, QUIET, resume=True)


def test_a_second_run_in_the_same_folder_is_refused(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    train(recipe(data, folder / "run", train={"steps": 2}), comm, QUIET)
    with pytest.raises(UsageError, match="holds a run already; --resume continues it"):
        train(recipe(data, folder / "run"), comm, QUIET)
    with pytest.raises(MismatchError, match=r"model\.width was 32 and is 64"):
        train(recipe(data, folder / "run", model={"width": 64}), comm, QUIET, resume=True)
    train(recipe(data, folder / "run", train={"steps": 2}), comm, QUIET, resume=True)
    assert len(metrics(folder / "run")) == 3


def test_a_batch_that_the_ranks_do_not_divide(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.size == 1:
        pytest.skip("one rank divides every batch")
    with pytest.raises(LayoutError, match=f"13 sequences.*{comm.size} ranks"):
        train(recipe(data, folder / "run", train={"batch": 13}), comm, QUIET)
    assert not (folder / "run").exists()


def test_a_dataset_shorter_than_one_context(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    with pytest.raises(DataError, match="context"):
        train(recipe(data, folder / "run", model={"context": 10_000_000}), comm, QUIET)
    assert not (folder / "run").exists()


@pytest.mark.slow("trains whole runs")
def test_the_clusters_profile_chooses_how_gradients_meet(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    here = describe_cluster(comm)
    slow, fast = (
        Cost(((1024, 1.0), (1 << 24, 1.0)), 1.0, 1e9, 0.0),
        Cost(((1024, 1e-6), (1 << 24, 1e-6)), 1e-6, 1e9, 0.0),
    )
    costs = tuple(
        CollectiveCost(
            "allreduce",
            name,
            "float32",
            "cpu",
            here.nodes,
            comm.size,
            here.ranks_per_node,
            True,
            cost,
        )
        for name, cost in (("shared", slow), ("mpi", slow), ("rabenseifner", fast))
    )
    run = folder / "run"
    if comm.rank == 0:
        run.mkdir()
        ClusterProfile("today", here, costs).save(run / "cluster.json")
        ClusterProfile("today", replace(here, mpi_version="0.1"), costs).save(
            folder / "foreign.json"
        )
    comm.Barrier()
    printed = io.StringIO()
    train(recipe(data, run), comm, Console(comm.rank == 0, printed))
    if comm.rank == 0 and comm.size > 1:
        assert "gradients: 1 bucket by rabenseifner, after the backward pass" in printed.getvalue()
    foreign = {"parallel": {"profile": str(folder / "foreign.json")}}
    printed = io.StringIO()
    train(recipe(data, folder / "other", **foreign), comm, Console(comm.rank == 0, printed))
    if comm.rank == 0:
        assert printed.getvalue().count("is of another cluster") == 1
        assert "rabenseifner" not in printed.getvalue()
    missing = {"parallel": {"profile": str(folder / "nowhere.json")}}
    with pytest.raises(UsageError, match="there is no profile"):
        train(recipe(data, folder / "third", **missing), comm, QUIET)
    assert not (folder / "third").exists()


def test_one_rank_that_raises_ends_the_job_with_its_reason(
    data: Path, folder: Path, python
) -> None:  # type: ignore[no-untyped-def]
    script = folder / "raise.py"
    script.write_text(
        "import sys\n"
        "from mpillm.comm.failure import fail_together\n"
        "from mpillm.comm.world import open_world\n"
        "from mpillm.system.console import Console\n"
        "from mpillm.train import setup, step\n"
        "from mpillm.train.recipe import parse_recipe\n"
        "comm = open_world()\n"
        "class Faulty(step.Trainer):\n"
        "    def step(self, step, stop=0):\n"
        "        if comm.rank == 1 and step == 3:\n"
        "            raise RuntimeError('the cable burnt')\n"
        "        return super().step(step, stop)\n"
        "setup.Trainer = Faulty\n"
        "table = {'model': {'layers': 1, 'width': 32, 'heads': 2, 'context': 32},\n"
        "         'data': {'path': sys.argv[1]},\n"
        "         'train': {'run': sys.argv[2], 'steps': 100, 'batch': 6}}\n"
        "with fail_together(comm):\n"
        "    setup.train(parse_recipe(table, 'x'), comm, Console(comm.rank == 0))\n"
    )
    begun = time.monotonic()
    done = python(script, data, folder / "run", ranks=3, timeout=120)
    assert done.returncode != 0
    assert "rank 1 of 3" in done.stderr
    assert "RuntimeError: the cable burnt" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 100
