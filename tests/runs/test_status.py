"""`mpillm status`: the state of a run, training or not, whole or half-written."""

import io
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import LaunchError, UsageError
from mpillm.runs import state as state_module
from mpillm.runs.folder import HISTORY, JOB, LOCK, METRICS, RECIPE
from mpillm.runs.history import HistoryWriter
from mpillm.runs.lock import RunLock
from mpillm.runs.state import columns, read_run
from mpillm.runs.status import Ask, print_status, run_figures
from mpillm.system.console import Console
from mpillm.tokens.dataset_folder import dataset_around, is_dataset

HOLD = """
import sys, time
from pathlib import Path
from mpillm.launch.current_job import CurrentJob
from mpillm.runs.lock import RunLock
RunLock(Path(sys.argv[1]), CurrentJob("slurm", "12"))
print("held", flush=True)
time.sleep(600)
"""


def facts(**changes: object) -> dict[str, object]:
    return {
        "ranks": 4,
        "hosts": {"n1": [0, 1], "n2": [2, 3]},
        "mesh": "data=4",
        "job": None,
        "deadline": None,
    } | changes


def a_run(
    folder: Path, steps: int = 30, goal: int = 100, **last: float
) -> tuple[Path, HistoryWriter]:
    """Make a run of `steps` steps with a checkpoint at step 20, begun and without an end."""
    run = folder / "run"
    checkpoint = run / "checkpoints/step-00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index.json").write_text("{}")
    lines: list[dict[str, float]] = [
        {
            "step": step,
            "loss": 5 - step / 100,
            "tokens": 512 * step,
            "tokens_per_second": 256.0,
            "step_seconds": 2.0,
        }
        for step in range(1, steps + 1)
    ]
    lines[-1] |= last
    lines.insert(20, {"step": 20, "validation_loss": 4.75})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.toml").write_text(f'[train]\nrun = "{run}"\nsteps = {goal}\n')
    return run, HistoryWriter(run, writes=True)


def told(run: Path, ask: Ask | None = None) -> str:
    out = io.StringIO()
    print_status(run, Console(stream=out), ask=ask)
    return out.getvalue()


def as_json(run: Path, ask: Ask | None = None) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    out = io.StringIO()
    print_status(run, Console(stream=out), as_json=True, ask=ask)
    (line,) = out.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


def test_a_run_at_work(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts(deadline=time.time() + 60))
    lock = RunLock(run, None)
    try:
        text, found = told(run), as_json(run)
    finally:
        lock.release()
    assert "running on n1, n2 since" in text
    assert "30 of 100" in text
    assert "4.7000 (mean of the last steps 4.8450)" in text
    assert "4.7500 at step 20" in text
    assert "256 tokens/s, 2 s a step" in text
    assert "2:20 for 70 steps; the job ends in" in text
    assert "too early: it will save and stop before" in text
    assert f"{run}/checkpoints/step-00000020, " in text
    assert "it continues by itself" in text
    assert (found["state"], found["step"], found["steps"], found["seconds_left"]) == (
        "running",
        30,
        100,
        140.0,
    )
    assert (found["tokens"], found["validation_step"], found["checkpoint"]["step"]) == (
        30 * 512,
        20,
        20,
    )
    assert str(os.getpid()) in found["holder"]


@pytest.mark.usefixtures("processes")
def test_a_run_whose_process_is_killed_says_so(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            assert as_json(run)["state"] == "running"
            assert "job 12 (slurm)" in as_json(run)["holder"]
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert (run / LOCK).exists()
    text = told(run)
    assert "killed, no end on record; last trace 20" in text
    assert (
        f"read the output of the job, then mpirun -n 4 mpillm train {run}/recipe.toml --resume "
        "continues from step 20" in text
    )


def environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_runs_that_ended(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts(ranks=1))
    diary.ended("stopped", 30, "SIGUSR1 on rank 2")
    assert ": SIGUSR1 on rank 2" in told(run)
    assert as_json(run)["next"] == f"mpillm train {run}/recipe.toml --resume continues from step 20"
    diary.started(20, facts())
    diary.ended("failed", 25, "the loss at step 25 is no longer a number")
    assert ": the loss at step 25 is no longer a number" in told(run)
    assert "repair the failure, then mpirun -n 4 mpillm train" in told(run)
    assert "2: 1 stopped, 1 failed" in told(run)
    diary.started(20, facts())
    diary.ended("finished", 30)
    assert f"mpillm evaluate {run}" in told(run)
    assert "time left" not in told(run)
    assert [attempt["how"] for attempt in as_json(run)["attempts"]] == [
        "stopped",
        "failed",
        "finished",
    ]


def test_what_the_scheduler_says(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    asked = []

    def ask(scheduler: str, job: str) -> str:
        asked.append((scheduler, job))
        return "QUEUED" if scheduler == "pbs" else "COMPLETED"

    def broken(scheduler: str, job: str) -> str:
        raise LaunchError("cannot run squeue")

    diary.started(0, facts(job={"scheduler": "pbs", "id": "7.head", "restart": 0}))
    diary.ended("stopped", 30, "the time limit is near")
    assert "pbs 7.head: QUEUED" in told(run, ask)
    assert as_json(run, ask)["next"] == "the job continues by itself"
    job = {
        "scheduler": "slurm",
        "id": "12",
        "nodes": 2,
        "ranks_per_node": 3,
        "seconds": 5400,
        "partition": "short",
    }
    (run / JOB).write_text(json.dumps(job | {"output": "job-12.out"}))
    wanted = (
        f"mpillm submit {run}/recipe.toml --nodes 2 --ranks-per-node 3 --time 01:30:00 "
        "--partition short --resume"
    )
    for answer in (ask, broken, None):
        found = as_json(run, answer)
        assert (found["job"]["id"], found["job"]["output"]) == ("12", "job-12.out")
        assert found["next"] == f"{wanted} continues from step 20"
    assert "slurm 12; its output: job-12.out" in told(run)
    assert asked == [("pbs", "7.head"), ("pbs", "7.head"), ("slurm", "12")]


def test_a_run_that_waits_for_its_job(tmp_path: Path) -> None:
    (tmp_path / JOB).write_text(json.dumps({"scheduler": "slurm", "id": "12"}))
    assert "submitted, not started yet" in told(tmp_path)
    assert "slurm 12: PENDING" in told(tmp_path, lambda *_: "PENDING")
    assert as_json(tmp_path)["step"] == 0
    assert as_json(tmp_path)["seconds_left"] is None


def test_half_a_line_and_numbers_that_are_none(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path, loss=math.nan, tokens_per_second=math.inf)
    diary.started(0, facts())
    diary.ended("failed", 30, "the loss at step 30 is no longer a number")
    for name in ("metrics.jsonl", "history.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 31, "lo')
    found = as_json(run)
    assert (found["step"], found["loss"], found["state"]) == (30, None, "failed")
    assert found["recent_loss"] == pytest.approx(4.85)
    assert found["tokens_per_second"] == 256.0
    assert "nan" in told(run)


def test_a_run_of_an_older_mpillm(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path)
    assert "unknown: it has no history" in told(run)
    assert (as_json(run)["step"], as_json(run)["attempts"]) == (30, [])
    (run / "recipe.toml").write_text("[train]\nsteps = 30\n")
    assert as_json(run)["state"] == "finished"
    (run / "recipe.toml").unlink()
    (run / "metrics.jsonl").unlink()
    assert as_json(run)["step"] == 0


def test_recent_means_of_the_newest_attempt(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path, step_seconds=8.0)
    diary.started(0, facts())
    diary.started(29, facts())
    assert run_figures(read_run(run))["step_seconds"] == 8.0
    diary.started(30, facts())
    assert run_figures(read_run(run))["step_seconds"] == 2.0


def test_what_is_no_run(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path)
    for path, reason in (
        (tmp_path / "nowhere", "there is no folder"),
        (run / "recipe.toml", "is a file; name the run's folder"),
        (
            run / "checkpoints/step-00000020",
            f"is one checkpoint; name the run that it belongs to: {run}",
        ),
        (tmp_path, "is not a run's folder: it holds none of metrics.jsonl"),
    ):
        with pytest.raises(UsageError, match=reason):
            print_status(path, Console(speaks=False))


def test_columns() -> None:
    found = columns(
        [{"step": 1, "a": 1}, {"a": 7}, {"step": 2, "b": 2.5}, {"step": 3, "a": "x", "b": None}]
    )
    assert list(found["step"]) == [1, 2, 3]
    assert [str(value) for value in found["a"]] == ["1.0", "nan", "nan"]
    assert [str(value) for value in found["b"]] == ["nan", "2.5", "nan"]


@pytest.mark.usefixtures("processes")
def test_the_login_node_stays_light(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    code = (
        "import sys\nfrom pathlib import Path\nfrom mpillm.system.console import Console\n"
        "from mpillm.runs.report.run_report import write_report\n"
        "from mpillm.runs.status import print_status\n"
        "print_status(Path(sys.argv[1]), Console())\nwrite_report(Path(sys.argv[1]), Console())\n"
        "heavy = ('torch', 'mpi4py', 'h5py', 'tokenizers')\n"
        "print('loaded:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run],
        text=True,
        capture_output=True,
        check=True,
        env=environment(),
    )
    assert "loaded: []" in done.stdout


@pytest.mark.usefixtures("processes")
def test_a_run_whose_process_is_stopped_is_suspended(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            text, found = told(run), as_json(run)
            assert found["state"] == "suspended"
            assert f"kill -CONT {process.pid} lets it continue" in found["reason"]
            assert f"suspended on n1, n2 since {text.partition('since ')[2][:19]}" in text
            process.send_signal(signal.SIGCONT)
        finally:
            process.kill()


def test_a_run_that_does_not_advance_says_so(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    lock = RunLock(run, None)
    try:
        assert as_json(run)["reason"] == ""
        # Another rank is stopped: rank 0 lives, and no step is recorded.
        later = time.time() + state_module.QUIET_SECONDS + 61
        state = read_run(run, later)
        assert (state.state, state.reason[:39]) == (
            "running",
            "silent: no step was recorded for 11:01;"[:39],
        )
        # A step of 30 s may take as long.
        slow, _ = a_run(tmp_path / "slow", step_seconds=30.0)
        assert read_run(slow, later).reason == ""
        os.utime(run / LOCK, (0, time.time() - 200))
        assert "silent: its lock has had no update for 3:2" in told(run)
        assert as_json(run)["state"] == "running"
    finally:
        lock.release()


def test_a_lock_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    (run / LOCK).write_text("")
    assert as_json(run)["holder"].startswith("an unknown job: its lock cannot be read")
    os.utime(run / LOCK, (0, 0))
    assert as_json(run)["state"] == "killed"


DAMAGES = {
    "null": b"null\n",
    "number": b"3\n",
    "object": b"{}\n",
    "list": b"[1, 2]\n",
    "no UTF-8": b'{"step": 3, "x": "\xff"}\n',
    "NULs": b"\0" * 5000,
    "torn": b'{"step": 31, "loss": 2',
    "many digits": b'{"step": ' + b"7" * 5000 + b"}\n",
    "deep": b"[" * 100_000 + b"\n",
    "control": b'{"event": "failed", "time": "2026-11-26T12:00:00Z", "step": 9, '
    b'"reason": "\\u001b[2J\\ud800"}\n',
}


@pytest.mark.parametrize("name", [METRICS, HISTORY, JOB, RECIPE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_log_hides_the_run(tmp_path: Path, name: str, damage: str) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    (run / JOB).write_text('{"scheduler": "slurm", "id": "12"}')
    whole = name in (METRICS, HISTORY)
    (run / name).write_bytes((run / name).read_bytes() * whole + DAMAGES[damage])
    found, text = as_json(run), told(run)
    assert found["checkpoint"]["step"] == 20
    assert (found["step"], len(found["attempts"])) == (30, 1)
    assert "\x1b" not in text
    fine = damage in ("object", "control") and name == JOB
    fine = fine or (damage == "control" and name == HISTORY)
    if not fine:
        assert f"{name} cannot be read" in text or f"of {name} cannot be read" in text
        assert list(found["damage"]) == [name]


@pytest.mark.parametrize("name", [METRICS, HISTORY, JOB, RECIPE, "job.toml", LOCK])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_what_is_no_file_is_said(tmp_path: Path, name: str, kind: str) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nothing")
    text = told(run)
    assert as_json(run)["checkpoint"]["step"] == 20
    if name != "job.toml":
        assert "cannot be read" in text or f"{name} is a link to nothing" in text


def test_flipped_bytes_hide_no_run(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts(job={"scheduler": "slurm", "id": "12"}, deadline=time.time()))
    diary.saved(20, run / "checkpoints/step-00000020", 0.5, 1234)
    diary.ended("stopped", 30, "SIGUSR1 on rank 2")
    (run / JOB).write_text(
        json.dumps({"scheduler": "slurm", "id": "12", "nodes": 2, "seconds": 60, "output": "x"})
    )
    chance = random.Random(16)
    for _ in range(100):
        path = run / chance.choice([METRICS, HISTORY, JOB, RECIPE])
        before = path.read_bytes()
        data = bytearray(before)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        told(run)
        assert as_json(run)["checkpoint"]["step"] == 20
        path.write_bytes(before)


def test_dates_and_numbers_out_of_all_bounds(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path, step_seconds=1e308, tokens=1e300, tokens_per_second=1e300)
    diary.started(0, facts(deadline=1e308, ranks=10**30, steps="x", hosts={"n1": 7}))
    for name in (METRICS, "checkpoints/step-00000020/index.json"):
        os.utime(run / name, (1 << 45, 1 << 45))
    (run / RECIPE).write_text("[train]\nsteps = 99999999999999999999999\n")
    lock = RunLock(run, None)
    try:
        assert as_json(run)["steps"] is None
        assert told(run)
    finally:
        lock.release()
    assert as_json(run)["state"] == "killed"
    assert "0:00 ago" in told(run)


def test_advice_names_what_is_there_alone(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts(ranks=1))
    diary.saved(30, run / "checkpoints/step-00000030", 0.5, 1234)
    assert "step-00000020, " in told(run)
    assert "; the last one on record, checkpoints/step-00000030, is gone" in told(run)
    (run / "checkpoints/step-00000020/index.json").unlink()
    found = as_json(run)
    assert (found["checkpoint"], found["lost_checkpoint"]) == (None, "checkpoints/step-00000030")
    assert found["damage"] == {
        "checkpoints": "no index that can be read: step-00000020; no checkpoint is whole"
    }
    assert f"restore a checkpoint from a backup, for none in {run}/checkpoints" in found["next"]
    assert found["commands"] == []
    (run / "checkpoints/step-00000020").rmdir()
    found = as_json(run)
    assert found["next"].endswith("--resume begins at step 1: no checkpoint is left")
    (run / RECIPE).unlink()
    found = as_json(run)
    assert found["commands"] == []
    assert f"with the recipe that began it: none can be read in {run}" in found["next"]
    diary.ended("finished", 30)
    assert as_json(run)["commands"] == [f"mpillm report {run}"]


ODD = "my 'runs'/$(touch CANARY) \"é\" `id` & ; --x"


def words_of(command: str) -> list[str]:
    return shlex.split(command)


def test_commands_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, diary = a_run(tmp_path)
    run = tmp_path / ODD
    run.parent.mkdir()
    diary.started(0, facts())
    diary.ended("stopped", 30)
    made.rename(run)
    (command,) = as_json(run)["commands"]
    assert words_of(command) == [
        *("mpirun", "-n", "4", "mpillm", "train"),
        str(run / RECIPE),
        "--resume",
    ]
    assert f"{command} continues from step 20" in told(run)
    HistoryWriter(run, writes=True).started(0, facts())
    HistoryWriter(run, writes=True).ended("finished", 30)
    for command in as_json(run)["commands"]:
        assert str(run) in words_of(command)
        assert command in told(run)
    # A name that begins with a dash is no option.
    monkeypatch.chdir(tmp_path)
    run.rename("-r")
    assert as_json(Path("-r"))["commands"][0] == "mpillm evaluate ./-r"


def test_advice_holds_in_the_folder_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of a recipe is found from the folder in which it trained, and not from another."""
    home = tmp_path / "home of it"
    run, diary = a_run(home)
    diary.started(0, facts(ranks=1))
    diary.ended("stopped", 30)
    (run / RECIPE).write_text('[train]\nrun = "run"\n[data]\npath = "prepared"\n')
    (home / "prepared").mkdir()
    (home / "prepared/manifest.json").write_text('{"format": "mpillm.tokens", "version": 1}')
    monkeypatch.chdir(home)
    assert as_json(Path("run"))["commands"] == ["mpillm train run/recipe.toml --resume"]
    monkeypatch.chdir(tmp_path)
    relative = Path("home of it/run")
    (command,) = as_json(relative)["commands"]
    assert words_of(command) == [
        *("cd", str(home), "&&", "mpillm", "train", str(run / RECIPE), "--resume")
    ]
    diary.started(0, facts())
    diary.ended("finished", 30)
    assert words_of(as_json(relative)["commands"][0])[:4] == ["cd", str(home), "&&", "mpillm"]
    assert as_json(relative)["moved_from"] is None
    # Other data has its place: the newest checkpoint records which one it was trained on.
    index, manifest = run / "checkpoints/step-00000020/index.json", home / "prepared/manifest.json"
    before = manifest.read_text()
    index.write_text('{"facts": {"data": "0a"}}')
    manifest.write_text('{"format": "mpillm.tokens", "digest": "0b"}')
    monkeypatch.chdir(home)
    assert [words_of(command)[1] for command in as_json(Path("run"))["commands"]] == [
        "generate",
        "report",
    ]
    diary.started(0, facts())
    other = "; its data prepared is another dataset than it was trained on"
    assert other in as_json(Path("run"))["next"]
    manifest.write_text('{"format": "mpillm.tokens", "digest": "0a"}')
    assert other not in as_json(Path("run"))["next"]
    manifest.write_text(before)
    diary.ended("finished", 30)
    monkeypatch.chdir(tmp_path)
    # Moved away from its data: no command that cannot work is printed.
    run.rename(tmp_path / "moved")
    assert "its recipe names run: this is a copy, or was moved" in told(Path("moved"))
    assert [words_of(command)[1] for command in as_json(Path("moved"))["commands"]] == [
        "generate",
        "report",
    ]
    HistoryWriter(tmp_path / "moved", writes=True).started(0, facts())
    assert "; its data prepared is not found from here" in as_json(Path("moved"))["next"]


def test_a_moved_run_is_continued_from_the_folder_that_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No submission and no path of the recipe leads to its data, but the record of its start."""
    run, diary = a_run(tmp_path / "here")
    home = tmp_path / "home"
    (home / "prepared").mkdir(parents=True)
    (home / "prepared/manifest.json").write_text('{"format": "mpillm.tokens", "version": 1}')
    (run / RECIPE).write_text('[train]\nrun = "run"\n[data]\npath = "prepared"\n')
    diary.started(0, facts(folder=str(home)))
    diary.ended("stopped", 30)
    monkeypatch.chdir(tmp_path)
    (command,) = as_json(run)["commands"]
    assert words_of(command)[:3] == ["cd", str(home), "&&"]
    assert words_of(command)[-2:] == [str(run / RECIPE), "--resume"]


@pytest.mark.parametrize("named", ["../home/run", "link/run", "run", "../elsewhere/../home/run"])
def test_a_run_that_is_named_another_way_was_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    home = tmp_path / "home"
    run, diary = a_run(home)
    (home / "link").symlink_to(home)
    (tmp_path / "elsewhere").mkdir()
    diary.started(0, facts(folder=str(home)))
    (run / RECIPE).write_text(f'[train]\nrun = "{named}"\n')
    for here in (home, tmp_path / "elsewhere", run):
        monkeypatch.chdir(here)
        assert as_json(Path(os.path.relpath(run)))["moved_from"] is None
    run.rename(tmp_path / "moved")
    assert as_json(tmp_path / "moved")["moved_from"] == named


def test_what_is_no_run_is_said_with_its_reason(tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    data.mkdir()
    (data / "manifest.json").write_text('{"format": "mpillm.tokens"}')
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    long = "x" * 260
    for path, reason in (
        (data, "is a dataset's folder and not a run's"),
        (tmp_path / "gone", r"there is no folder .*gone \(it is a link to nothing\)"),
        (tmp_path / long, "File name too long; choose a shorter name"),
        (Path(f"{tmp_path}/a\0b"), "null"),
        (Path("/proc/self"), "is not a run's folder"),
        (data / "manifest.json/run", "there is no folder"),
    ):
        with pytest.raises(UsageError, match=reason):
            print_status(path, Console(speaks=False))


def test_which_folders_are_datasets(tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    (data / "runs/x").mkdir(parents=True)
    for text, right in (
        (None, False),
        ("{}", False),
        ("[" * 100_000, False),
        ('{"format": "mpillm.tokens"}', True),
    ):
        if text is not None:
            (data / "manifest.json").write_text(text)
        assert is_dataset(data) == right
        assert dataset_around(data / "runs/new/er") == (data.resolve() if right else None)


def test_a_time_has_its_zone(tmp_path: Path) -> None:
    run, diary = a_run(tmp_path)
    diary.started(0, facts())
    (attempt,) = read_run(run).attempts
    assert abs((datetime.now(UTC) - attempt.began).total_seconds()) < 3600
