"""The lock of a run: the file `lock` in its folder names the job that holds it.

A parallel file system need not have file locks, and a killed job removes nothing. So the lock is a
file that appears whole, and only where there was none, and its holder touches it every
BEAT_SECONDS. The lock is stale once its holder is known to be gone, or after DEAD_SECONDS without a
touch. A lock that cannot be read is held until then, too.

A holder that was suspended may find another job's lock in place of its own. It has lost the run:
`RunLock.lost` names the new holder.
"""

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.launch.current_job import CurrentJob
from mpillm.runs.folder import LOCK, SUBMIT_LOCK
from mpillm.system.atomic import temporary_path
from mpillm.system.console import Console, clock
from mpillm.system.file_clock import age_seconds, file_clock
from mpillm.system.json_text import from_json, to_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import open_plain
from mpillm.system.processes import birth_of, process_space, state_and_birth

# Metadata of a parallel file system may be late by some seconds, so a few beats must be missed; a
# lost holder should block the run for no more than two minutes.
BEAT_SECONDS = 15.0
DEAD_SECONDS = 120.0
# File systems without hard links answer link(2) so.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
LARGEST_LOCK = 1 << 16
UNREADABLE, GONE = "a lock that cannot be read", "no lock any more"


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

    @classmethod
    def from_json(cls, value: Any) -> "Holder | None":
        """Read the holder from the object of a lock; None where a part is missing or of another
        type.
        """
        try:
            job = value.pop("job")
            found = cls(**value, job=CurrentJob(**job) if job else None)
        except (TypeError, KeyError, AttributeError):
            return None
        texts = [found.host, found.born, found.system, found.since, found.token]
        numbers = [found.pid]
        if found.job:
            texts += [found.job.scheduler, found.job.id]
            numbers.append(found.job.restart)
        right = all(isinstance(text, str) for text in texts) and all(
            isinstance(number, int) for number in numbers
        )
        return found if right else None


@dataclass(frozen=True)
class HeldLock:
    """A lock that is held now, as far as this host can know."""

    holder: Holder | None
    """None: the lock cannot be read."""
    silent_seconds: float
    """Since its last update."""
    suspended: bool = False
    """Its process is stopped (SIGSTOP, gang scheduling); known on its own host alone."""

    def describe(self) -> str:
        if self.holder:
            return self.holder.describe()
        age = clock(self.silent_seconds)
        return f"an unknown job: its lock cannot be read, and was updated {age} ago"


@dataclass(frozen=True)
class _Found:
    """A lock as it was found: its holder, and the file that says so."""

    holder: Holder | None
    file: tuple[int, int]
    """Inode and last update in nanoseconds."""
    modified: float
    changed: float


def this_process(job: CurrentJob | None) -> Holder:
    return Holder(
        socket.gethostname(),
        os.getpid(),
        birth_of(os.getpid()),
        process_space(),
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
        return birth_of(holder.pid) != holder.born
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

    def __init__(
        self,
        folder: Path,
        job: CurrentJob | None,
        warn: Callable[[str], None] | None = None,
        name: str = LOCK,
    ) -> None:
        """Take the lock, the file `name`; `warn` gets a line where a damaged one was replaced.

        Raises UsageError, naming the holder, where another job holds the run.
        """
        self._path, self._me = folder / name, this_process(job)
        self._warn = warn or Console().warn
        self.lost = ""
        """The holder that took the run over from this process, or what became of its lock; "" while
        this one holds it.
        """
        # The heartbeat's thread and the one that saves read and mend the same file.
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name="heartbeat of the run's lock", daemon=True
        )
        try:
            self._take()
            self._renewed = self._checked = _boot_seconds()
            self._thread.start()
        except BaseException:
            # Ctrl-C may come between the lock and its heartbeat.
            self._remove_own()
            raise

    def is_lost(self, fresh: bool = False) -> bool:
        """Return whether another job has replaced the lock, as one may after a long suspension.

        Reads the file where `fresh`, or where the last reading is older than a beat: a process
        that was suspended notices before it writes anything.
        """
        if not self.lost and (fresh or _boot_seconds() - self._checked > BEAT_SECONDS):
            with suppress(OSError, UsageError):
                self._renew()
        return bool(self.lost)

    def refuse_if_lost(self, fresh: bool = True) -> None:
        """Raise LostLockError, naming the new holder, where another job holds the run now."""
        lost, run = self.is_lost(fresh), self._path.parent
        silence = _boot_seconds() - self._renewed
        if not lost and silence > DEAD_SECONDS:
            raise LostLockError(
                f"the lock of the run {run} could not be read for {clock(silence)}, and another "
                "job may hold the run; this one stops without writing anything more"
            )
        if lost and self.lost in (GONE, UNREADABLE):
            raise LostLockError(
                f"the run {run} has {self.lost}, and another job may have held it meanwhile: this "
                "one was suspended for too long; it stops without writing anything more"
            )
        if lost:
            raise LostLockError(
                f"the run {run} is held by {self.lost} now: this job was suspended "
                "for too long and was replaced; it stops without writing anything more"
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        self._remove_own()

    def _remove_own(self) -> None:
        with suppress(OSError):
            found = _find(self._path)
            if found and found.holder == self._me:
                self._path.unlink()

    def _take(self) -> None:
        folder, submits = self._path.parent, self._path.name == SUBMIT_LOCK
        for _ in range(2):
            if self._make():
                return
            found = _find(self._path)
            if found is None:
                continue
            hold = _judge(self._path, found, self._me)
            if hold is not None:
                verb = "is being submitted" if submits else "is held"
                rest = "" if submits else ", end it, or name another train.run"
                raise UsageError(
                    f"the run {folder} {verb} by {hold.describe()}; wait for it{rest} "
                    "(the lock of a job that died on another host, or that cannot be read, expires "
                    f"{DEAD_SECONDS:g} s after its last update)"
                )
            self._set_aside(found)
        raise UsageError(
            f"the run {folder} was taken by another job just now; name another train.run"
        )

    def _make(self) -> bool:
        """Put a whole lock there; return false where there is one."""
        whole = temporary_path(self._path)
        try:
            try:
                _write_new(whole, self._me)
                return _link_new(whole, self._path, self._me)
            finally:
                whole.unlink(missing_ok=True)
        except OSError as failure:
            raise UsageError(f"cannot make {self._path}: {explain(failure)}") from failure

    def _set_aside(self, judged: _Found) -> None:
        """Remove a stale lock, `judged`; of several jobs that do so at once one succeeds."""
        # rename(2) is atomic: only one job can move the stale file, and it can check it again.
        aside = self._path.with_name(f".{self._path.name}.{self._me.token}.left")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        except OSError as failure:
            raise UsageError(f"cannot replace {self._path}: {explain(failure)}") from failure
        found = _find(aside)
        if found is not None and (found.file, found.holder) != (judged.file, judged.holder):
            # Another job was faster, or the holder lives, and this is its lock: put it back.
            _put_back(aside, self._path)
            return
        left = _remove(aside)
        if judged.holder is None:
            self._warn(f"replacing {self._path}, {UNREADABLE}{left}")

    def _beat(self) -> None:
        while not self.lost and not self._ended.wait(BEAT_SECONDS):
            # A file system that does not answer now may answer at the next beat.
            with suppress(OSError, UsageError):
                self._renew()

    def _renew(self) -> None:
        """Touch the lock if it is this process's own; else find out what became of it."""
        with self._turn:
            self._checked = _boot_seconds()
            self._touch_or_lose()

    def _touch_or_lose(self) -> None:
        for _ in range(2):
            found = _find(self._path, touch=self._me)
            if found and found.holder == self._me:
                self._renewed = _boot_seconds()
                return
            if found and found.holder:
                self.lost = found.holder.describe()
                return
            if _boot_seconds() - self._renewed > DEAD_SECONDS:
                # Another job may have held the run and left since the last beat.
                self.lost = UNREADABLE if found else GONE
                return
            if found:
                # Damaged, and not yet long enough without an update for another job to replace it.
                self._set_aside(found)
            if self._make():
                self._renewed = _boot_seconds()
                return
            # Another lock appeared meanwhile: it is judged as the first one.


def find_hold(folder: Path, name: str = LOCK) -> HeldLock | None:
    """Return the hold on the run in `folder` now, as far as this host can know; None without."""
    found = _find(folder / name)
    return _judge(folder / name, found, this_process(None)) if found else None


def _judge(path: Path, found: _Found, me: Holder) -> HeldLock | None:
    """Return the hold that a lock shows; None where it is stale.

    An unreadable lock expires by its age.
    """
    holder, here = found.holder, found.holder is not None and found.holder.system == me.system
    # Its age on its file system costs a probe file, so it is measured only where it counts.
    silence = max(0.0, time.time() - found.modified) if here else _silence(path, found)
    if silence >= DEAD_SECONDS if holder is None else is_gone(holder, me, silence):
        return None
    suspended = here and holder is not None and state_and_birth(holder.pid)[0] in ("T", "t")
    return HeldLock(holder, silence, suspended)


def _silence(path: Path, found: _Found) -> float:
    return age_seconds(found.modified, found.changed, file_clock(path))


def _find(path: Path, touch: Holder | None = None) -> _Found | None:
    """Read the lock at `path`; None where there is none. `touch`: update it if this holds it.

    A link is not followed, and a pipe or a device is not read: such a lock has no holder.
    """
    holder = None
    try:
        with open_plain(path, os.O_NOFOLLOW) as file:
            seen = os.fstat(file.fileno())
            with suppress(ValueError, UnicodeDecodeError):
                holder = Holder.from_json(from_json(file.read(LARGEST_LOCK).decode()))
            if touch is not None and holder == touch:
                # By descriptor: the file that was read is touched, and never another job's.
                os.utime(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as failure:
        if failure.errno not in (errno.ELOOP, errno.EINVAL, errno.EACCES, errno.ENXIO):
            raise
        try:
            seen = path.lstat()
        except FileNotFoundError:
            return None
    return _Found(holder, (seen.st_ino, seen.st_mtime_ns), seen.st_mtime, seen.st_ctime)


def _write_new(path: Path, holder: Holder) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(to_json(asdict(holder)).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _link_new(whole: Path, path: Path, holder: Holder) -> bool:
    """Give the file `whole` the name `path`; return false where that name is taken."""
    try:
        os.link(whole, path)
    except FileExistsError:
        # NFS may report a link that it made as one that was there: the count of names decides.
        return whole.stat().st_nlink == 2
    except OSError as failure:
        if failure.errno not in NO_LINKS:
            raise
        try:
            # Half a lock may be seen for a moment here; it counts as held.
            _write_new(path, holder)
        except FileExistsError:
            return False
    return True


def _put_back(aside: Path, path: Path) -> None:
    """Give a lock its name again, unless there is another by now."""
    try:
        os.link(aside, path, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError:
        # Without hard links, and for a folder.
        if not os.path.lexists(path):
            aside.rename(path)
            return
    _remove(aside)


def _remove(aside: Path) -> str:
    """Remove what a stale lock was; return where it is kept if it is a folder with files."""
    try:
        if aside.is_dir() and not aside.is_symlink():
            aside.rmdir()
        else:
            aside.unlink()
    except OSError:
        return f"; it is kept as {aside}"
    return ""


def modified(path: Path) -> float:
    """Return when a file was last written, in unix seconds and not in the future; 0 without."""
    try:
        return min(max(0.0, path.stat().st_mtime), time.time())
    except OSError:
        return 0.0


def _boot_seconds() -> float:
    # Unlike the monotonic clock it counts the time that the host was suspended.
    return time.clock_gettime(time.CLOCK_BOOTTIME)
