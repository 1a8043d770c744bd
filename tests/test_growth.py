"""Plug-ins: each kind is one file of tests/growth, and nothing else changes.

A recipe or an option names it as `growth.module:Name`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.comm.communicator import Communicator
from mpillm.errors import UsageError
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.loading import load_trained
from mpillm.system.console import Console
from mpillm.system.plugins import load_plugin
from mpillm.tasks.task_catalog import TASKS
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.reader import open_split
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parent), str(HERE)])
QUIET = Console(speaks=False)
STEPS = 6

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[None]:
    """Make the plug-ins importable, as PYTHONPATH does for a user's own package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="session")
def data(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Prepare a small dataset of bytes. Tests read it; none writes into it."""
    out = shared_folder / "growth-data"
    prepare(PrepareOptions((str(documents),), out, tokenizer="bytes", validation=0.1), comm, QUIET)
    return out


def recipe(data: Path, run: Path, **parallel: object) -> Recipe:
    table = {
        "model": {"architecture": "growth.toy_architecture:TwoStreams"},
        "task": {"name": "growth.toy_task:EvenTargets"},
        "optimizer": {
            "name": "growth.toy_optimizer:MomentumSettings",
            "learning_rate": 0.05,
            "warmup_steps": 2,
            # A rate that does not depend on `steps`, so that a resumed run can be compared.
            "schedule": "constant-then-decay",
            "decay_share": 0.0,
        },
        "data": {"path": str(data)},
        "train": {
            "run": str(run),
            "sinks": [],
            "steps": STEPS,
            "batch": 12,
            "microbatch": 1,
            "save_every": 3,
        },
        "parallel": parallel,
    }
    return parse_recipe(table, "toy")


def recorded(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def losses(run: Path) -> list[float]:
    return recorded(run, "loss")


@pytest.fixture(scope="module")
def trained_alone(
    data: Path, shared_folder: Path, comm: MPI.Intracomm, toys: None
) -> dict[str, list[float]]:
    """Metrics of one process that sees the whole batch: the reference."""
    run = shared_folder / "growth-alone"
    if comm.rank == 0:
        train(recipe(data, run), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    keys = ("loss", "grad_norm", "validation_loss", "validation_accuracy")
    return {key: recorded(run, key) for key in keys}


def test_a_toy_model_task_and_optimizer_train_at_any_number_of_ranks(
    data: Path, folder: Path, comm: MPI.Intracomm, trained_alone: dict[str, list[float]]
) -> None:
    expected = trained_alone["loss"]
    assert len(expected) == STEPS
    assert expected[-1] < expected[0]
    assert len(trained_alone["validation_accuracy"]) == 1
    run = folder / "data-parallel"
    train(recipe(data, run), comm, QUIET)
    for key, values in trained_alone.items():
        assert recorded(run, key) == pytest.approx(values, rel=1e-5), key


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "growth.toy_schedule:Hurried"])
@pytest.mark.parametrize("stages", ["two", "a rank each"])
def test_a_toy_model_of_two_streams_trains_and_is_scored_in_a_pipeline(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    trained_alone: dict[str, list[float]],
    stages: str,
    schedule: str,
) -> None:
    """With a part in the middle, one weight in three places, and a field that every part reads."""
    pipeline = 2 if stages == "two" else comm.size
    if comm.size % pipeline or (stages != "two" and comm.size < 3):
        pytest.skip("needs another number of ranks")
    run = folder / "pipeline"
    train(recipe(data, run, pipeline=pipeline, schedule=schedule), comm, QUIET)
    for key, expected in trained_alone.items():
        assert recorded(run, key) == pytest.approx(expected, rel=1e-5), key


def test_a_toy_metric_is_the_same_at_any_number_of_ranks(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    train(recipe(data, folder / "run"), comm, QUIET)
    loaded = load_trained(folder / "run", comm, QUIET)
    with open_split(data, "validation") as reader:
        together = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
        alone = evaluate(
            WholeModel(loaded.model, loaded.task, MPI.COMM_SELF), reader, MPI.COMM_SELF, QUIET
        )
    assert together == alone
    assert list(together.values) == ["loss", "accuracy"]
    assert 0 <= together.values["accuracy"] <= 1


def test_a_toy_run_resumes_with_its_optimizers_state(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    train(recipe(data, folder / "whole"), comm, QUIET)
    rest = recipe(data, folder / "part")
    train(replace(rest, train=replace(rest.train, steps=STEPS // 2)), comm, QUIET)
    train(rest, comm, QUIET, resume=True)
    assert losses(folder / "part") == losses(folder / "whole")


def test_a_toy_algorithm_sums_as_the_mpi_library_does(comm: MPI.Intracomm) -> None:
    group = Communicator(comm)
    for count in (1, 7, 1000):
        array = np.arange(count, dtype=np.float32) + comm.rank
        expected = np.empty_like(array)
        comm.Allreduce(array, expected)
        group.allreduce(array, algorithm="growth.toy_algorithm:STAR")
        np.testing.assert_array_equal(array, expected)
    group.free()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_toy_check_is_part_of_the_doctors_report(mpillm: Run, tmp_path: Path, ranks: int) -> None:
    check = "growth.toy_check:ShortName"
    done = mpillm("doctor", tmp_path, "--check", check, "--json", ranks=ranks, PYTHONPATH=PATHS)
    rows = json.loads(done.stdout)["findings"]
    own = {row["name"]: row for row in rows if row["area"] == "toys"}
    assert own["short name"]["found"].startswith("the host is called ")
    if ranks > 1:
        assert own["ranks"]["found"] == "2 ranks answered"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_toy_verb_is_called_by_its_name(mpillm: Run, ranks: int) -> None:
    verb = "growth.toy_verb:AddUp"
    done = mpillm(verb, "--number", "3", ranks=ranks, PYTHONPATH=PATHS)
    assert done.stdout == f"the sum is {3 * ranks}\n", done.stderr
    helped = mpillm(verb, "--help", PYTHONPATH=PATHS)
    assert "What each rank brings." in helped.stdout
    assert "mpirun -n 2 mpillm growth.toy_verb:AddUp" in helped.stdout


# The program of the toy job: what a rank finds out about its job.
# Python starts the script, so that it has the clean environment of the suite's processes.
RUN_SCRIPT = "import os, sys; os.execvp('bash', ['bash', sys.argv[1]])"
LOOK = (
    "import os; from mpillm.launch.current_job import current_job, job_end; "
    "print(current_job(os.environ), job_end(os.environ))"
)


def test_a_toy_scheduler_takes_a_job(mpillm: Run, python: Run, tmp_path: Path) -> None:
    spool, recipe_file, site_file = (tmp_path / name for name in ("spool", "r.toml", "site.toml"))
    spool.mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text('{"format": "mpillm.tokens"}')
    recipe_file.write_text(
        f'[model]\nlayers = 1\n[data]\npath = "{tmp_path}/data"\n'
        f'[train]\nrun = "{tmp_path}/run"\nbatch = 4\n'
    )
    program = [sys.executable, "-c", LOOK]
    site_file.write_text(
        'scheduler = "growth.toy_scheduler:SPOOL"\ndirectives = ["-nice"]\n'
        # The script asks for 2 ranks, and this machine may have 1 core.
        'launcher_arguments = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]\n'
        f"program = {json.dumps(program)}\n"
    )
    surroundings = {"PYTHONPATH": PATHS, "SPOOL_FOLDER": str(spool)}
    words: list[str | Path] = ["submit", recipe_file, "--nodes", "1", "--ranks-per-node", "2"]
    words += ["--time", "10m", "--site", site_file]

    # By an option, without the site file's scheduler.
    option = ("--scheduler", "growth.toy_scheduler:SPOOL")
    shown = mpillm(*words[:-2], *option, "--dry-run", **surroundings).stdout
    assert shown.startswith("#!/bin/bash\n#SPOOL seconds=600 ranks=2\n# Written by")
    assert list(spool.iterdir()) == []

    done = mpillm(*words, **surroundings)
    assert "job 1 is submitted to the spool: 1 node × 2 ranks" in done.stdout, done.stderr
    script = spool / "1.sh"
    assert "#SPOOL -nice\n" in script.read_text()
    again = mpillm(*words, **surroundings)
    assert "is submitted already, as job 1 (SPOOLED)" in again.stderr
    status = mpillm("status", tmp_path / "run", **surroundings).stdout
    assert "SPOOLED" in status
    assert "the job continues by itself" in status
    (spool / "1.state").write_text("GONE\n")
    assert "--resume" in mpillm("status", tmp_path / "run", **surroundings).stdout

    end = {"SPOOL_JOB": "1", "SPOOL_END": "4102444800"}
    ran = python("-c", RUN_SCRIPT, script, **surroundings, **end)
    found = "CurrentJob(scheduler='growth.toy_scheduler:SPOOL', id='1', restart=0) 4102444800.0"
    assert ran.stdout.count(found) == 2, ran.stdout + ran.stderr


def test_each_plugin_is_one_file() -> None:
    kinds = (
        "architecture",
        "task",
        "metric",
        "optimizer",
        "algorithm",
        "schedule",
        "check",
        "scheduler",
        "verb",
    )
    assert {path.stem for path in (HERE / "growth").glob("*.py")} == {f"toy_{k}" for k in kinds}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("growth.nowhere:Thing", "cannot be imported: No module named 'growth.nowhere'"),
        ("growth.toy_task:Nothing", "module growth.toy_task has no Nothing"),
        ("causal-ml", "did you mean causal-lm"),
    ],
)
def test_a_plugin_that_is_not_there_is_named(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_plugin(name, TASKS, "task")
