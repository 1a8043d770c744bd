"""The folder that a job prepares a dataset in, which is also its hold on the output.

    .OUT.<16 digits>.prepare/   next to OUT, made by rank 0, with a name that nobody can predict
        owner.json              the process, its host, the output and what is prepared
        dataset/                the dataset, renamed to OUT when it is whole
        …                       the tokens of each rank until the shuffle

While the owner touches owner.json, no other job prepares the same output. The folder of a process
that is surely gone, or silent for DEAD_SECONDS, is removed by the next job, and so is an empty one;
nothing else without our owner.json ever is. So a job that was suspended for too long finds its
folder gone, and stops.

    .OUT.publish.prepare/       while one job gives its dataset the name OUT
        owner.json
"""

import errno
import math
import os
import random
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console
from mpillm.system.file_clock import age_seconds, file_clock
from mpillm.system.json_text import read_json, to_json
from mpillm.system.processes import birth_of, process_space

if TYPE_CHECKING:
    from mpi4py import MPI

OWNER, DATASET = "owner.json", "dataset"
FORMAT = "mpillm.prepare"
PUBLISH = "publish"
# As long as a run's lock: a parallel file system may be late by some seconds, so a few beats may be
# missed, and a lost host should block the output for no more than two minutes.
BEAT_SECONDS, DEAD_SECONDS = 15.0, 120.0
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.2, 2.0
# A name may have 255 bytes, and a letter up to 4.
NAME_LETTERS = 40


@dataclass(frozen=True)
class Owner:
    """The process that prepares `out`; `prep` identifies the sources and options."""

    host: str
    pid: int
    birth: str
    space: str
    since: str
    out: str
    prep: str

    def describe(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended: it was one of this host, and runs no more."""
        return self.space == process_space() and birth_of(self.pid) != self.birth


@dataclass(frozen=True)
class WorkFolder:
    path: Path
    waited: bool
    """Whether another job prepared the same meanwhile."""
    owner: Owner

    @property
    def dataset(self) -> Path:
        return self.path / DATASET


@contextmanager
def work_folder(
    out: Path, prep: Mapping[str, Any], comm: "MPI.Intracomm", console: Console
) -> Iterator[WorkFolder]:
    """Make the job's folder to prepare `out` in, and remove it at the end, however that comes.

    Every rank of `comm` calls it. Where another job prepares the same with the same `prep`, it
    waits until that one ends. Raises UsageError where the other prepares something else.
    """
    ended = threading.Event()
    # Noted before they are made: a signal may come at any line.
    made: list[Path] = []
    try:
        work = on_root(comm, lambda: take(out, to_json(prep), console.say, made))
        made.append(work.path)
        if comm.rank == 0:
            threading.Thread(target=_beat, args=(work.path / OWNER, ended), daemon=True).start()
        yield work
    except BaseException:
        # The ranks that wait for this one may be ended before they can remove anything.
        for path in made:
            _give_back(path)
        raise
    else:
        # No rank leaves before it is gone.
        on_root(comm, lambda: _give_back(work.path))
    finally:
        ended.set()


def take(out: Path, prep: str, say: Callable[[str], None], made: list[Path]) -> WorkFolder:
    """Make a work folder for `out` once no other job has one. One process of a job calls it.

    `made` gets each path before it is made.
    """
    parent = place_of(out)
    make_folder(parent)
    me = _this_process(out, prep)
    waited, pause = False, POLL_SECONDS
    while True:
        other = _living(parent, out, say)
        if other is not None and other.prep != prep:
            raise UsageError(
                f"another job prepares {out} from other sources or with other options "
                f"({other.describe()}); wait for it, or choose another --out"
            )
        if other is not None:
            if not waited:
                say(f"another job prepares {out} with the same options ({other.describe()}): wait")
            waited = True
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)
            continue
        path = _make(parent, out, me, made)
        # Two jobs that made theirs at once see each other: both remove it, and wait at random.
        if _living(parent, out, say, besides=(path,)) is None:
            return WorkFolder(path, waited, me)
        _give_back(path)
        time.sleep(random.uniform(0.0, 2 * POLL_SECONDS))


def remove_left_over(out: Path, say: Callable[[str], None]) -> None:
    """Remove what jobs that are gone left next to `out`, also where nothing is to be prepared."""
    with suppress(OSError):
        _living(place_of(out), out, say)


@contextmanager
def alone(work: WorkFolder, out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one job at a time give its dataset the name `out`, and none that has lost its hold.

    Rank 0 calls it. Raises UsageError where another job has taken the output over meanwhile.
    """
    parent, ended = work.path.parent, threading.Event()
    lock = parent / f".{out.name[:NAME_LETTERS]}.{PUBLISH}.prepare"
    begun = parent / f".{out.name[:NAME_LETTERS]}.{secrets.token_hex(8)}.tmp"
    inode = 0
    try:
        _fill(begun, work.owner)
        inode = begun.stat().st_ino
        _enter(begun, lock, out, say)
        threading.Thread(target=_beat, args=(lock / OWNER, ended), daemon=True).start()
        if read_owner(work.path) != work.owner:
            raise UsageError(taken_over(out))
        with suppress(OSError):
            os.utime(work.path / OWNER)
        other = _living(parent, out, say, besides=(work.path, lock))
        if other is not None:
            raise UsageError(taken_over(out, f" ({other.describe()})"))
        yield
    finally:
        ended.set()
        for path in (begun, lock):
            # Not where another job has put its own in place of this one.
            with suppress(OSError):
                if path.lstat().st_ino == inode:
                    _remove(path)


def _enter(begun: Path, lock: Path, out: Path, say: Callable[[str], None]) -> None:
    """Give the folder `begun` the name `lock`, once no other job's has it."""
    until = time.monotonic() + 2 * DEAD_SECONDS
    while True:
        try:
            # rename(2) replaces an empty folder at most, and every lock holds its owner.
            begun.rename(lock)
            return
        except OSError as failure:
            if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if time.monotonic() > until:
                raise UsageError(
                    f"{lock} is held, and by no job that is known to have ended; remove it if no "
                    f"job prepares {out} now"
                ) from failure
        _living(lock.parent, out, say)
        time.sleep(POLL_SECONDS)


def taken_over(out: Path | str, job: str = "") -> str:
    """Say why this job stops without having written its dataset."""
    return (
        f"another job{job} prepares {out} in place of this one, which was suspended for too long "
        "or lost its folder; this one stops without writing there; wait for the other, or choose "
        "another --out"
    )


def place_of(out: Path) -> Path:
    """Return the folder for the work folder of `out`: its parent, or `out` itself where it must.

    A rename needs the same file system, and a mounted folder is one of its own.
    """
    closed = out.is_dir() and not os.access(out.parent, os.W_OK)
    return out if closed or os.path.ismount(out) else out.parent


def is_work_folder(name: str) -> bool:
    """Return whether a name is that of a work folder or its lock, of any output."""
    return re.fullmatch(rf"\..*\.([0-9a-f]{{16}}|{PUBLISH})\.prepare", name, re.DOTALL) is not None


def _make(parent: Path, out: Path, me: Owner, made: list[Path]) -> Path:
    """Make a new folder with its owner inside from the first moment that it has its name."""
    name = f".{out.name[:NAME_LETTERS]}.{secrets.token_hex(8)}"
    begun, path = parent / f"{name}.tmp", parent / f"{name}.prepare"
    made += (begun, path)
    _fill(begun, me)
    (begun / DATASET).mkdir()
    begun.rename(path)
    return path


def _fill(begun: Path, me: Owner) -> None:
    # mkdir(2) follows no link and fails where there is anything of this name.
    begun.mkdir()
    text = to_json({"format": FORMAT, **asdict(me)}, indent=1) + "\n"
    (begun / OWNER).write_text(text, encoding="utf-8")


def _living(
    parent: Path, out: Path, say: Callable[[str], None], besides: Collection[Path] = ()
) -> Owner | None:
    """Return the owner of another work folder of `out`, after removing those of jobs gone."""
    found, now = None, None
    with os.scandir(parent) as entries:
        names = sorted(entry.name for entry in entries if _is_begun_or_made(entry.name, out))
    for path in (parent / name for name in names):
        if path in besides or path.is_symlink():
            continue
        owner = read_owner(path)
        if owner is None or owner.out != str(out):
            _remove_empty(path)
            continue
        if not owner.is_gone:
            # One probe file at most, and only where there is something to measure.
            now = now or file_clock(path)
            if _silence(path / OWNER, now) < DEAD_SECONDS:
                # A folder that is still being made holds nothing yet.
                found = found or (owner if is_work_folder(path.name) else None)
                continue
        with suppress(OSError):
            _remove(path)
            say(f"removed {path}, left over by {owner.describe()}")
    return found


def _is_begun_or_made(name: str, out: Path) -> bool:
    """Return whether a name is that of a work folder, or of one of `out` that is being made."""
    begun = re.escape(f".{out.name[:NAME_LETTERS]}.") + r"[0-9a-f]{16}\.tmp"
    return is_work_folder(name) or re.fullmatch(begun, name) is not None


def _remove_empty(path: Path) -> None:
    """Remove what a job left that was killed between its first or last file and its folder.

    A folder that is being made is empty for a moment, and is not touched before DEAD_SECONDS.
    """
    with suppress(OSError):
        if not is_work_folder(path.name) and _silence(path, file_clock(path)) < DEAD_SECONDS:
            return
        path.rmdir()


def _give_back(path: Path) -> None:
    """Remove a work folder of this process, if it is there: the owner last."""
    with suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a work folder. Raises OSError where it is still there.

    By rename: of several jobs one succeeds, and a late owner finds nothing of its own. What this
    process cannot finish keeps its owner, so that another job may.
    """
    stem = path.name.removesuffix(".prepare").rpartition(".")[0]
    aside = path.with_name(f"{stem}.{secrets.token_hex(8)}.prepare")
    path.rename(aside)
    # The owner last.
    for inner in sorted(aside.iterdir(), key=lambda inner: inner.name == OWNER):
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
        else:
            inner.unlink()
    aside.rmdir()


def read_owner(path: Path) -> Owner | None:
    """Read the owner of a work folder; None where it is no work folder of ours."""
    try:
        value = read_json(path / OWNER)
        return Owner(**value) if value.pop("format") == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _silence(owner: Path, now: float) -> float:
    """Return the seconds since the owner last touched its file, `now` by the file's own clock."""
    try:
        seen = owner.stat()
    except FileNotFoundError:
        return math.inf
    return age_seconds(seen.st_mtime, seen.st_ctime, now)


def _beat(owner: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(owner)


def _this_process(out: Path, prep: str) -> Owner:
    pid, since = os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Owner(socket.gethostname(), pid, birth_of(pid), process_space(), since, str(out), prep)
