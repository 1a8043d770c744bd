"""One job a run: the file `lock` in the run's folder tells who holds it, and shows signs of life.

A parallel file system need not have file locks, and a job that is killed takes nothing back. So the lock is a file that
is made only where there was none; its holder touches it now and then; and it counts as left behind when its holder is
known to be gone, or has shown no sign of life for long.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.launch.current_job import CurrentJob

LOCK = "lock"
# Metadata of a parallel file system may be late by some seconds; a lost holder should not cost long.
BEAT_SECONDS = 15.0
DEAD_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run: rank 0 of its job."""

    host: str
    pid: int
    born: str
    """When the process began, as its kernel counts; a process number alone is given again."""
    system: str
    """Which boot and which process namespace the two belong to."""
    since: str
    token: str
    job: CurrentJob | None = None

    def describe(self) -> str:
        job = f"job {self.job.id} ({self.job.scheduler}), " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


def this_process(job: CurrentJob | None) -> Holder:
    return Holder(
        socket.gethostname(),
        os.getpid(),
        _born(os.getpid()),
        _system(),
        time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        uuid.uuid4().hex,
        job,
    )


def is_gone(holder: Holder, me: Holder, silent_seconds: float) -> bool:
    """Whether `holder` no longer runs, as far as `me` can know: its process is gone from this very system, its batch
    job was started anew, as `me`, or it was silent for long.
    """
    if holder.system == me.system:
        return _born(holder.pid) != holder.born
    again = bool(
        holder.job
        and me.job
        and (holder.job.scheduler, holder.job.id) == (me.job.scheduler, me.job.id)
        and holder.job.restart < me.job.restart
    )
    return again or silent_seconds > DEAD_SECONDS


class RunLock:
    """The lock of the run in `folder`, taken. One process a job makes it, and lets it go with `release`."""

    def __init__(self, folder: Path, job: CurrentJob | None) -> None:
        """Raises UsageError, naming the holder, where another job holds the run."""
        self._path, self._me = folder / LOCK, this_process(job)
        self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name="heartbeat of the run's lock", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if read_holder(self._path.parent) == self._me:
                self._path.unlink()

    def _take(self) -> None:
        folder = self._path.parent
        for _ in range(2):
            if self._make():
                return
            holder = read_holder(folder)
            if not _left_behind(folder, holder, self._me):
                raise UsageError(
                    f"the run {folder} is held by {holder.describe() if holder else 'a job that begins just now'}; "
                    "wait for it, end it, or name another train.run (one that died elsewhere is free "
                    f"{DEAD_SECONDS:g} s after its last sign of life)"
                )
            self._set_aside(holder)
        raise UsageError(
            f"the run {folder} was taken by another job just now; name another train.run"
        )

    def _make(self) -> bool:
        try:
            file = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        except OSError as failure:
            raise UsageError(
                f"cannot make {self._path}: {failure.strerror}; free some space there"
            ) from failure
        try:
            with file:
                json.dump(asdict(self._me), file)
        except OSError as failure:
            self._path.unlink()
            raise UsageError(
                f"cannot write {self._path}: {failure.strerror}; free some space there"
            ) from failure
        return True

    def _set_aside(self, judged: Holder | None) -> None:
        """Take away the lock that was found to be left behind; of several jobs that do so at once one succeeds."""
        aside = self._path.with_name(f".{LOCK}.{self._me.token}.left")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            if _read(aside) != judged:
                # Somebody else was faster, and this is the lock of that one.
                aside.rename(self._path)
            else:
                aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


def read_holder(folder: Path) -> Holder | None:
    """Who holds, or held, the run in `folder`; None where there is no lock, or none that can be read."""
    return _read(folder / LOCK)


def silent_seconds(folder: Path) -> float:
    """How long the lock's holder has shown no sign of life, by the clock of the file system itself."""
    probe = folder / f".{LOCK}.{uuid.uuid4().hex}.now"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / LOCK).stat().st_mtime
    except OSError:
        return max(0.0, time.time() - modified(folder / LOCK))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def live_holder(folder: Path) -> Holder | None:
    """Who holds the run in `folder` now, as far as can be known from here."""
    holder = read_holder(folder)
    return None if holder is None or _left_behind(folder, holder, this_process(None)) else holder


def _left_behind(folder: Path, holder: Holder | None, me: Holder) -> bool:
    """Whether the lock in `folder` is of a `holder` that is gone; of one that cannot be read (None) silence tells."""
    # Silence is asked for by a file that is made, so only where it counts.
    silence = 0.0 if holder is not None and holder.system == me.system else silent_seconds(folder)
    return silence >= DEAD_SECONDS if holder is None else is_gone(holder, me, silence)


def _read(path: Path) -> Holder | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        job = value.pop("job")
        return Holder(**value, job=CurrentJob(**job) if job else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def modified(path: Path) -> float:
    """When a file was last written, in unix seconds; 0 where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _born(pid: int) -> str:
    """The start time of a process, "" where none runs: proc(5), fields 3 and 22 of stat. One that ended and that nobody
    asked for (Z) does not run.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return "" if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        return ""


def _system() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text(encoding='ascii').strip()}:{space.stat().st_ino}"
    except OSError:
        return f"unknown:{uuid.uuid4().hex}"
