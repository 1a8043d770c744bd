"""One job a run."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.launch.current_job import CurrentJob
from mpillm.runs import lock as lock_module
from mpillm.runs.folder import LOCK, SUBMIT_LOCK
from mpillm.runs.lock import (
    BEAT_SECONDS,
    DEAD_SECONDS,
    GONE,
    Holder,
    LostLockError,
    RunLock,
    age_seconds,
    find_hold,
    is_gone,
    this_process,
)

JOB = CurrentJob("slurm", "12", 1)


def plant(folder: Path, **changes: object) -> None:
    """Write the lock of another system's process."""
    (folder / LOCK).write_text(
        json.dumps(asdict(this_process(None)) | {"system": "elsewhere"} | changes)
    )


def named_in(folder: Path) -> Holder | None:
    """Return the holder that the lock names, whether it lives or not."""
    try:
        return Holder.from_json(json.loads((folder / LOCK).read_text()))
    except (OSError, ValueError):
        return None


def test_a_lock_is_taken_once_and_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, JOB)
    assert find_hold(tmp_path)
    holder = named_in(tmp_path)
    assert holder is not None
    assert (holder.pid, holder.job) == (os.getpid(), JOB)
    with pytest.raises(
        UsageError, match=rf"is held by job 12 \(slurm\), process {os.getpid()} on .* wait for it"
    ):
        RunLock(tmp_path, None)
    lock.release()
    assert not find_hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_process_is_gone_is_taken(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mpillm.runs.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), None); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert named_in(tmp_path) is not None
    assert not find_hold(tmp_path)
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
    hold = find_hold(tmp_path)
    assert hold is not None
    long_ago = hold.silent_seconds + DEAD_SECONDS + 5
    os.utime(tmp_path / LOCK, (0, (tmp_path / LOCK).stat().st_mtime - long_ago))
    RunLock(tmp_path, None).release()
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_was_started_anew_takes_its_own_lock(tmp_path: Path) -> None:
    plant(tmp_path, job=asdict(replace(JOB, restart=0)))
    RunLock(tmp_path, JOB).release()


def test_a_lock_that_cannot_be_read_is_held_for_its_usual_time(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(UsageError, match="held by an unknown job: its lock cannot be read"):
        RunLock(tmp_path, None)
    os.utime(tmp_path / LOCK, (0, 0))
    RunLock(tmp_path, None).release()


def test_a_lock_that_another_took_over_is_left_alone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None)
    plant(tmp_path)
    lock.release()
    assert (tmp_path / LOCK).exists()


def until(true: object) -> None:
    """Wait until a function gives true; a minute is far more than it takes."""
    end = time.monotonic() + 60
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.02)


@pytest.mark.usefixtures("fast_beats")
def test_a_beat_touches_the_lock_of_its_own_alone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None)
    os.utime(tmp_path / LOCK, (0, 0))
    until(lambda: (tmp_path / LOCK).stat().st_mtime > 1)
    plant(tmp_path, host="n7", pid=17)
    os.utime(tmp_path / LOCK, (0, 0))
    until(lambda: lock.lost)
    assert lock.lost.startswith("process 17 on n7 since")
    assert (tmp_path / LOCK).stat().st_mtime == 0
    lock.release()
    assert (tmp_path / LOCK).exists()


def test_a_save_is_refused_after_another_job_took_the_run(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None)
    lock.refuse_if_lost()
    plant(tmp_path, host="n7", pid=17)
    # The last reading is younger than a beat.
    assert not lock.is_lost()
    with pytest.raises(LostLockError, match=r"is held by process 17 on n7 .* now: this job was"):
        lock.refuse_if_lost()
    assert lock.is_lost()
    lock.release()
    assert (tmp_path / LOCK).exists()


@pytest.mark.usefixtures("fast_beats")
@pytest.mark.parametrize("damage", ["gone", "empty", "folder", "link"])
def test_a_holder_mends_its_lock_while_nobody_else_may_take_it(tmp_path: Path, damage: str) -> None:
    lock = RunLock(tmp_path, None, warn=lambda text: None)
    mine = named_in(tmp_path)
    damaged(tmp_path, damage)
    until(lambda: named_in(tmp_path) == mine)
    assert not lock.lost
    lock.release()
    assert [path.name for path in tmp_path.iterdir() if path.name != "secret"] == []


@pytest.mark.usefixtures("fast_beats")
def test_a_holder_that_was_suspended_too_long_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path, None)
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", -1.0)
    (tmp_path / LOCK).unlink()
    until(lambda: lock.lost)
    assert lock.lost == GONE
    with pytest.raises(LostLockError, match=r"the run \S+ has no lock any more, and another"):
        lock.refuse_if_lost()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def damaged(folder: Path, damage: str) -> None:
    path = folder / LOCK
    path.unlink(missing_ok=True)
    (folder / "secret").write_text("mine")
    if damage == "empty":
        path.write_text("")
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to(folder / "secret")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "null":
        path.write_text("null")
    elif damage == "types":
        plant(folder, pid="../../x")
    elif damage == "deep":
        path.write_text("[" * 50_000)
    else:
        assert damage == "gone"


@pytest.mark.parametrize("damage", ["empty", "folder", "link", "pipe", "null", "types", "deep"])
def test_a_damaged_lock_is_replaced_after_its_usual_time(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    damaged(tmp_path, damage)
    hold = find_hold(tmp_path)
    assert hold is not None
    assert "cannot be read" in hold.describe()
    with pytest.raises(UsageError, match="cannot be read, and was updated 0:0"):
        RunLock(tmp_path, None, said.append)
    os.utime(tmp_path / LOCK, (0, 0), follow_symlinks=False)
    assert find_hold(tmp_path) is None
    lock = RunLock(tmp_path, None, said.append)
    assert named_in(tmp_path) is not None
    assert said == [f"replacing {tmp_path / LOCK}, a lock that cannot be read"]
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_folder_with_files_in_place_of_the_lock_is_kept(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    (tmp_path / LOCK / "precious").touch()
    os.utime(tmp_path / LOCK, (0, 0))
    said: list[str] = []
    RunLock(tmp_path, None, said.append).release()
    (kept,) = tmp_path.iterdir()
    assert str(kept) in said[0]
    assert (kept / "precious").exists()


def test_a_date_in_the_future_is_not_believed(tmp_path: Path) -> None:
    plant(tmp_path)
    os.utime(tmp_path / LOCK, (1 << 33, 1 << 33))
    # os.utime changes the inode now: so long ago the lock was last updated.
    hold = find_hold(tmp_path)
    assert hold is not None
    assert hold.silent_seconds < DEAD_SECONDS
    now = time.time()
    assert age_seconds(now + 1e9, now - DEAD_SECONDS - 1, now) == DEAD_SECONDS + 1
    # A clock that is ahead by less than a beat is a clock like any other.
    assert age_seconds(now + BEAT_SECONDS / 2, now - 1e9, now) == 0
    assert age_seconds(now - 7, now, now) == 7
    # The clock of the file system was set back.
    assert age_seconds(now + 1e9, now + 1e6, now) == pytest.approx(1e6)


def test_a_lock_appears_whole(tmp_path: Path) -> None:
    """Another process that reads all the time sees no lock or a whole one, never half."""
    seen: set[bool] = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                text = (tmp_path / LOCK).read_text()
            except FileNotFoundError:
                continue
            seen.add(text.endswith("}"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        RunLock(tmp_path, None).release()
    ended.set()
    reader.join()
    assert seen <= {True}
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = RunLock(tmp_path, None)
    with pytest.raises(UsageError, match="is held by process"):
        RunLock(tmp_path, None)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_made_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot make .*/none/lock: .*No such file"):
        RunLock(tmp_path / "none", None)


def test_two_locks_of_one_folder(tmp_path: Path) -> None:
    run, submission = RunLock(tmp_path, None), RunLock(tmp_path, None, name=SUBMIT_LOCK)
    with pytest.raises(UsageError, match=r"is being submitted by process \d+ .*; wait for it \("):
        RunLock(tmp_path, None, name=SUBMIT_LOCK)
    submission.release()
    run.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("processes")
def test_a_process_that_is_stopped_still_holds_the_run(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mpillm.runs.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), None); print('taken', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "taken\n"
            hold = find_hold(tmp_path)
            assert hold is not None
            assert not hold.suspended
            child.send_signal(signal.SIGSTOP)
            until(lambda: (hold := find_hold(tmp_path)) and hold.suspended)
            with pytest.raises(UsageError, match=f"is held by process {child.pid}"):
                RunLock(tmp_path, None)
        finally:
            child.kill()


def test_a_lock_that_was_moved_by_mistake_is_put_back_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock changes hands after it was judged stale; the second time another one is there."""

    def no_links(*arguments: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    mine = RunLock(tmp_path, None)
    stale = replace(lock_module._find(tmp_path / LOCK), file=(1, 1))
    plant(tmp_path, host="n7", pid=17)
    monkeypatch.setattr(os, "link", no_links)
    mine._set_aside(stale)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    named = named_in(tmp_path)
    assert named is not None
    assert named.host == "n7"
    # Its beat judges again what it finds in place of its own.
    monkeypatch.setattr(mine, "_make", lambda: False)
    (tmp_path / LOCK).write_text("")
    monkeypatch.setattr(mine, "_set_aside", lambda found: plant(tmp_path, host="n8", pid=18))
    assert mine.is_lost(fresh=True)
    assert "on n8" in mine.lost
    mine.release()


def test_a_lock_that_cannot_be_reached_for_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's folder was moved, or its file system does not answer."""
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run, None)

    def fails(*arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "_find", fails)
        lock.refuse_if_lost()
        patch.setattr(lock_module, "DEAD_SECONDS", -1.0)
        with pytest.raises(LostLockError, match="could not be read for 0:00, and another job"):
            lock.refuse_if_lost()
    lock.release()


def test_an_interrupt_between_a_lock_and_its_heartbeat_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunLock(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
