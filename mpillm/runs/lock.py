"""The lock of a run: the file `lock` in its folder names the job that holds it.

A parallel file system need not have file locks, and a killed job removes nothing. So the lock is a
file that is created only where there was none, and its holder touches it every BEAT_SECONDS. The
lock is stale once its holder is known to be gone, or after DEAD_SECONDS without a touch.
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
from mpillm.runs.folder import LOCK

# Metadata of a parallel file system may be late by some seconds, so a few beats must be missed; a
# lost holder should block the run for no more than two minutes.
BEAT_SECONDS = 15.0
DEAD_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """The holder of a run: rank 0 of its job."""

    host: str
    pid: int
    born: str
    """The start time of the process, in its kernel's ticks: process numbers are used again."""
    system: str
    """The boot and the process namespace that pid and start time belong to."""
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
    """Return whether `holder` no longer runs, as far as `me` can know.

    Its process is gone from this same system, or its batch job was started again, as `me`, or
    `silent_seconds` are more than DEAD_SECONDS.
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


class LostLockError(UsageError):
    """Another job has taken the run over: this one must not write into its folder any more."""


class RunLock:
    """The lock of the run in `folder`, taken by one process of a job until `release`."""

    def __init__(self, folder: Path, job: CurrentJob | None) -> None:
        """Raises UsageError, naming the holder, where another job holds the run."""
        self._path, self._me = folder / LOCK, this_process(job)
        self._lost = ""
        self._take()
        self._seen = time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name="heartbeat of the run's lock", daemon=True
        )
        self._thread.start()

    def is_lost(self, fresh: bool = False) -> bool:
        """Return whether another job has replaced the lock, as one may after a long suspension.

        Reads the file where `fresh`, or where the last reading is older than a beat: a process
        that was suspended notices before it writes anything.
        """
        if not self._lost and (fresh or not 0 <= time.time() - self._seen <= BEAT_SECONDS):
            holder = read_holder(self._path.parent)
            self._seen = time.time()
            # A lock that is missing or cannot be read names no other holder.
            if holder is not None and holder.token != self._me.token:
                self._lost = holder.describe()
        return bool(self._lost)

    def refuse_if_lost(self, fresh: bool = True) -> None:
        """Raise LostLockError, naming the new holder, where another job holds the run now."""
        if self.is_lost(fresh):
            raise LostLockError(
                f"the run {self._path.parent} is held by {self._lost} now: this job was suspended "
                "for too long and was replaced; it stops without writing anything more"
            )

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
            if not _is_stale(folder, holder, self._me):
                name = holder.describe() if holder else "a job that begins just now"
                raise UsageError(
                    f"the run {folder} is held by {name}; wait for it, end it, or name another "
                    "train.run (the lock of a job that died on another host expires "
                    f"{DEAD_SECONDS:g} s after its last update)"
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
            raise self._unwritable("make", failure) from failure
        try:
            with file:
                json.dump(asdict(self._me), file)
        except OSError as failure:
            self._path.unlink()
            raise self._unwritable("write", failure) from failure
        return True

    def _unwritable(self, verb: str, failure: OSError) -> UsageError:
        return UsageError(f"cannot {verb} {self._path}: {failure.strerror}; free some space there")

    def _set_aside(self, judged: Holder | None) -> None:
        """Remove a stale lock, `judged`; of several jobs that do so at once one succeeds."""
        # rename(2) is atomic: only one job can move the stale file, and it can look again at it.
        aside = self._path.with_name(f".{LOCK}.{self._me.token}.left")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            if _read(aside) != judged:
                # Another job was faster, and this is its lock: put it back.
                aside.rename(self._path)
            else:
                aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                # A touch would keep the lock of another job alive.
                if not self.is_lost(fresh=True):
                    os.utime(self._path)


def read_holder(folder: Path) -> Holder | None:
    """Read the holder from the run's lock; None without a lock that can be read."""
    return _read(folder / LOCK)


def silent_seconds(folder: Path) -> float:
    """Return the seconds since the holder last touched the lock.

    The file system's own clock decides, for the clocks of two hosts may differ: a probe file is
    made next to the lock.
    """
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
    """Return the job that holds the run in `folder` now, as far as this host can know."""
    holder = read_holder(folder)
    return None if holder is None or _is_stale(folder, holder, this_process(None)) else holder


def _is_stale(folder: Path, holder: Holder | None, me: Holder) -> bool:
    """Return whether the lock in `folder` is stale. An unreadable one (None) expires by its age."""
    # Its age costs a probe file, so it is measured only where it counts.
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
    """Return when a file was last written, in unix seconds; 0 without a file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _born(pid: int) -> str:
    """Return the start time of a process, "" where it does not run: proc(5), fields 3 and 22.

    A zombie (Z) does not run.
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
