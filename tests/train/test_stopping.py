"""Runs that stop before their end: by a signal, or by the time limit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.runs.folder import HISTORY, LOCK, OUTCOME
from mpillm.runs.lock import this_process
from mpillm.system.console import Console
from mpillm.system.processes import state_and_birth
from mpillm.train.stopping import NO_REQUEST, TIME_IS_UP, Stopping, margin_seconds
from mpillm.weights.finding import find


def test_a_margin_is_learnt_from_saves_and_steps() -> None:
    assert margin_seconds(3600, None, 0.0) == 60
    assert margin_seconds(100, None, 0.0) == 10
    assert margin_seconds(5, None, 0.0) == 2
    assert margin_seconds(3600, 40.0, 3.0) == 2 + 2 * 40 + 2 * 3
    learning = Stopping(None, time.time() + 30)
    assert learning.stop_request() == NO_REQUEST
    learning.add_save_seconds(20)
    assert learning.stop_request() == TIME_IS_UP
    assert Stopping(None, time.time() + 30, save_seconds=20).stop_request() == TIME_IS_UP
    slow = Stopping(None, time.time() + 30)
    slow.add_step_seconds(15)
    assert slow.stop_request() == TIME_IS_UP
    assert Stopping(None, None).stop_request() == NO_REQUEST


def test_a_signal_goes_before_the_clock_and_names_its_rank() -> None:
    stopping = Stopping(None, time.time() + 75)
    assert stopping.stop_reason([NO_REQUEST, NO_REQUEST]) == ""
    assert stopping.stop_reason([TIME_IS_UP, signal.SIGUSR1]) == "SIGUSR1 on rank 1"
    assert stopping.stop_reason([TIME_IS_UP, NO_REQUEST]).startswith("the time limit is near: 1:1")


def write_recipe(folder: Path, data: Path, **train: object) -> Path:
    path = folder / "long.toml"
    settings = {"run": str(folder / "run"), "steps": 1_000_000, "batch": 4, **train}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path.write_text(
        "[model]\nlayers = 1\nwidth = 32\nheads = 2\ncontext = 32\n"
        f'[data]\npath = "{data}"\n[train]\n' + "\n".join(lines)
    )
    return path


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    limit = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def history(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGURG])
def test_a_run_that_is_asked_to_stop_saves_and_continues(
    data: Path, folder: Path, begin, number: signal.Signals
) -> None:  # type: ignore[no-untyped-def]
    run = folder / "run"
    process = begin("train", write_recipe(folder, data))
    wait_for(lambda: len(steps_of(run)) > 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    done = steps_of(run)
    assert done == list(range(1, len(done) + 1))
    assert (
        f"mpillm: stopped: {number.name} on rank 0; the run is saved as {run}/checkpoints/step-"
        in errors
    )
    assert "Traceback" not in errors
    assert not list((run / "checkpoints").glob(".*"))
    assert (run / OUTCOME).read_text() == "stopped\n"
    assert not (run / LOCK).exists()
    checkpoint = find(run, MPI.COMM_SELF, Console(speaks=False))
    checkpoint.verify()
    assert checkpoint.step == done[-1]
    assert [(event["event"], event["step"]) for event in history(run)] == [
        ("started", 0),
        ("saved", done[-1]),
        ("stopped", done[-1]),
    ]


def test_all_ranks_stop_after_one_step_when_one_is_asked(
    data: Path, folder: Path, mpillm, begin
) -> None:  # type: ignore[no-untyped-def]
    run, recipe = (
        folder / "run",
        write_recipe(folder, data, steps=150, fixed_order=True, microbatch=2),
    )
    process = begin("train", recipe, ranks=2)
    wait_for(lambda: len(steps_of(run)) > 3, process)
    ranks = [
        pid
        for pid in all_below(process.pid)
        if b"mpillm" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(ranks[-1], signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("mpillm: stopped: SIGUSR1 on rank ") == 1, errors
    stopped = steps_of(run)[-1]
    assert (run / OUTCOME).read_text() == "stopped\n"
    on = mpillm("train", recipe, "--resume", ranks=2)
    assert on.returncode == 0, on.stderr
    assert steps_of(run)[:-1] == list(range(1, 151))
    assert [event["event"] for event in history(run)] == [
        "started",
        "saved",
        "stopped",
        "started",
        "saved",
        "finished",
    ]
    assert history(run)[3]["step"] == stopped
    assert (run / OUTCOME).read_text() == "finished\n"
    never_stopped = mpillm("train", recipe, "--set", f"train.run={folder / 'whole'}", ranks=2)
    assert never_stopped.returncode == 0, never_stopped.stderr
    assert losses(run) == losses(folder / "whole")


def test_a_suspended_run_that_was_replaced_saves_nothing_more(
    data: Path, folder: Path, begin
) -> None:  # type: ignore[no-untyped-def]
    run = folder / "run"
    process = begin("train", write_recipe(folder, data, save_every=100))
    wait_for(lambda: len(steps_of(run)) > 3, process)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: state_and_birth(process.pid)[0] == "T", process)
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    outcome = (run / OUTCOME).read_text()
    # As another host takes the lock that was silent for too long.
    other = replace(this_process(None), host="node9", token="another")
    (run / LOCK).write_text(json.dumps(asdict(other)))
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert f"the run {run} is held by process {other.pid} on node9" in errors
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == saved
    assert (run / OUTCOME).read_text() == outcome
    assert json.loads((run / LOCK).read_text())["token"] == "another"


def all_below(parent: int) -> list[int]:
    """List the descendants of the process `parent`."""
    children = [
        int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ]
    return [pid for child in children for pid in (child, *all_below(child))]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] if "loss" in line else line["validation_loss"] for line in lines]


@pytest.mark.usefixtures("processes")
def test_a_second_interrupt_ends_at_once(data: Path, folder: Path) -> None:
    recipe = write_recipe(folder, data, save_every=20)
    # A step that never ends, so that nothing is agreed on.
    script = folder / "slow.py"
    script.write_text(
        "import sys, time\nfrom mpillm.train import setup, step\nfrom mpillm.cli import main\n"
        "class Slow(step.Trainer):\n"
        "    def step(self, step, stop=0):\n"
        "        if step == 25:\n"
        "            print('waiting', flush=True)\n"
        "            time.sleep(1000)\n"
        "        return super().step(step, stop)\n"
        "setup.Trainer = Slow\n"
        f"sys.argv = ['mpillm', 'train', {str(recipe)!r}]\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert any("waiting" in line for line in iter(process.stdout.readline, ""))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "mpillm: interrupted: the last good checkpoint is" in errors
    assert "Traceback" not in errors
    assert (folder / "run" / OUTCOME).read_text() == "failed\n"
    assert not list((folder / "run/checkpoints").glob(".*"))
    find(folder / "run", MPI.COMM_SELF, Console(speaks=False)).verify()


@pytest.mark.parametrize("limited_by", ["recipe", "batch system"])
def test_a_run_saves_before_its_time_is_up(
    data: Path, folder: Path, mpillm, limited_by: str
) -> None:  # type: ignore[no-untyped-def]
    recipe = write_recipe(folder, data)
    if limited_by == "recipe":
        done = mpillm("train", recipe, "--set", "train.time_limit=8s", ranks=2)
    else:
        done = mpillm("train", recipe, ranks=2, MPILLM_JOB_END=str(time.time() + 8))
    assert done.stderr.count("mpillm: stopped: the time limit ") == 1, done.stderr
    assert done.returncode != 0
    assert (folder / "run" / OUTCOME).read_text() == "stopped\n"
    saved = find(folder / "run", MPI.COMM_SELF, Console(speaks=False))
    assert saved.step == steps_of(folder / "run")[-1]


def test_one_clock_does_for_all_ranks(data: Path, folder: Path, python) -> None:  # type: ignore[no-untyped-def]
    """mpirun by ssh does not carry every variable to other hosts: rank 0's end is the job's."""
    recipe = write_recipe(folder, data)
    script = folder / "one_clock.py"
    script.write_text(
        "import os, sys\nfrom mpi4py import MPI\nfrom mpillm.cli import main\n"
        "if MPI.COMM_WORLD.rank:\n    del os.environ['MPILLM_JOB_END']\n"
        f"sys.argv = ['mpillm', 'train', {str(recipe)!r}]\nmain()\n"
    )
    done = python(script, ranks=4, MPILLM_JOB_END=str(time.time() + 8), timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("mpillm: stopped: the time limit ") == 1, done.stderr
    assert (folder / "run" / OUTCOME).read_text() == "stopped\n"


def test_a_run_that_another_job_holds_is_refused(data: Path, folder: Path, mpillm, begin) -> None:  # type: ignore[no-untyped-def]
    recipe, run = write_recipe(folder, data), folder / "run"
    process = begin("train", recipe)
    wait_for(lambda: len(steps_of(run)) > 1, process)
    second = mpillm("train", recipe, "--resume", ranks=2)
    assert second.returncode != 0
    assert second.stderr.count(f"the run {run} is held by process {process.pid} on ") == 1, (
        second.stderr
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    # A killed holder leaves its lock; the next job on this node takes it over.
    process = begin("train", recipe, "--resume")
    wait_for(lambda: (run / LOCK).exists() and "running" in (run / OUTCOME).read_text(), process)
    process.kill()
    process.communicate(timeout=60)
    assert (run / LOCK).exists()
    last = mpillm("train", recipe, "--resume", "--set", f"train.steps={steps_of(run)[-1] + 5}")
    assert last.returncode == 0, last.stderr
    assert not (run / LOCK).exists()


def test_a_time_limit_that_is_none(data: Path, folder: Path, mpillm) -> None:  # type: ignore[no-untyped-def]
    if MPI.COMM_WORLD.size > 1:
        pytest.skip("starts a process of its own")
    done = mpillm("train", write_recipe(folder, data, time_limit="90"))
    assert done.returncode == 2
    assert "time_limit: a time is H:MM:SS" in done.stderr
