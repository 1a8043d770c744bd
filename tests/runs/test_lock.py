"""One job a run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.launch.current_job import CurrentJob
from mpillm.runs.folder import LOCK
from mpillm.runs.lock import (
    DEAD_SECONDS,
    RunLock,
    is_gone,
    live_holder,
    read_holder,
    silent_seconds,
    this_process,
)

JOB = CurrentJob("slurm", "12", 1)


def plant(folder: Path, **changes: object) -> None:
    """Write the lock of another system's process."""
    (folder / LOCK).write_text(
        json.dumps(asdict(this_process(None)) | {"system": "elsewhere"} | changes)
    )


def test_a_lock_is_taken_once_and_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, JOB)
    assert live_holder(tmp_path)
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.pid, holder.job) == (os.getpid(), JOB)
    with pytest.raises(
        UsageError, match=rf"is held by job 12 \(slurm\), process {os.getpid()} on .* wait for it"
    ):
        RunLock(tmp_path, None)
    lock.release()
    assert not live_holder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_process_is_gone_is_taken(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mpillm.runs.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), None); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert read_holder(tmp_path) is not None
    assert not live_holder(tmp_path)
    RunLock(tmp_path, None).release()
    assert list(tmp_path.iterdir()) == []


def test_who_is_gone() -> None:
    me = this_process(JOB)
    assert not is_gone(me, me, 1e9)
    assert is_gone(replace(me, born="0"), me, 0)
    far = replace(me, system="elsewhere", job=None)
    assert not is_gone(far, me, DEAD_SECONDS - 1)
    assert is_gone(far, me, DEAD_SECONDS + 1)
    # The same batch job, started again: its earlier start has ended, its present one runs.
    assert is_gone(replace(far, job=replace(JOB, restart=0)), me, 0)
    assert not is_gone(replace(far, job=JOB), me, 0)
    # A job that its batch system ran again, and does not count.
    assert is_gone(replace(far, job=JOB), me, DEAD_SECONDS + 1)
    assert not is_gone(replace(far, job=replace(JOB, restart=2)), me, 0)
    assert not is_gone(replace(far, job=CurrentJob("slurm", "11", 0)), me, 0)


def test_a_process_that_ended_and_that_nobody_asked_for_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mpillm.runs.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), None); print('taken', flush=True); os._exit(0)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.read() == "taken\n"
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    RunLock(tmp_path, None).release()
    child.wait()


def test_a_silent_lock_of_elsewhere_is_taken_after_a_while(tmp_path: Path) -> None:
    plant(tmp_path)
    with pytest.raises(UsageError, match="is held by process"):
        RunLock(tmp_path, None)
    long_ago = silent_seconds(tmp_path) + DEAD_SECONDS + 5
    os.utime(tmp_path / LOCK, (0, (tmp_path / LOCK).stat().st_mtime - long_ago))
    RunLock(tmp_path, None).release()
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_was_started_anew_takes_its_own_lock(tmp_path: Path) -> None:
    plant(tmp_path, job=asdict(replace(JOB, restart=0)))
    RunLock(tmp_path, JOB).release()


def test_a_lock_that_cannot_be_read_is_a_job_that_begins(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(UsageError, match="held by a job that begins just now"):
        RunLock(tmp_path, None)
    os.utime(tmp_path / LOCK, (0, 0))
    RunLock(tmp_path, None).release()


def test_a_lock_that_another_took_over_is_left_alone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None)
    plant(tmp_path)
    lock.release()
    assert (tmp_path / LOCK).exists()
