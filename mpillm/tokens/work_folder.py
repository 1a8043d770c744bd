"""The folder that a job prepares a dataset in, which is also its hold on the output.

    .OUT.<16 digits>.prepare/   next to OUT, made by rank 0, with a name that nobody can predict
        owner.json              the process, its host, the output and what is prepared
        dataset/                the dataset, renamed to OUT when it is whole
        …                       the tokens of each rank until the shuffle

While the owner touches owner.json, no other job prepares the same output. The folder of a process
that is surely gone is removed by the next job; nothing without our owner.json ever is.
"""

import os
import random
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_root
from mpillm.errors import UsageError
from mpillm.system.atomic import make_folder
from mpillm.system.console import Console
from mpillm.system.json_text import read_json, to_json
from mpillm.system.processes import birth_of, process_space

if TYPE_CHECKING:
    from mpi4py import MPI

OWNER, DATASET = "owner.json", "dataset"
FORMAT = "mpillm.prepare"
# As long as a run's lock: a parallel file system may be late by some seconds, so a few beats may be
# missed, and a lost host should block the output for no more than two minutes.
BEAT_SECONDS, DEAD_SECONDS = 15.0, 120.0
POLL_SECONDS = 0.2
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
            shutil.rmtree(path, ignore_errors=True)
        raise
    else:
        # No rank leaves before it is gone.
        on_root(comm, lambda: shutil.rmtree(work.path, ignore_errors=True))
    finally:
        ended.set()


def take(out: Path, prep: str, say: Callable[[str], None], made: list[Path]) -> WorkFolder:
    """Make a work folder for `out` once no other job has one. One process of a job calls it.

    `made` gets each path before it is made.
    """
    parent = place_of(out)
    make_folder(parent)
    me = _this_process(out, prep)
    waited = False
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
            time.sleep(POLL_SECONDS)
            continue
        path = _make(parent, out, me, made)
        # Two jobs that made theirs at once see each other: both remove it, and wait at random.
        if _living(parent, out, say, besides=path) is None:
            return WorkFolder(path, waited)
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(random.uniform(0.0, 2 * POLL_SECONDS))


def place_of(out: Path) -> Path:
    """Return the folder for the work folder of `out`: its parent, or `out` itself where it must.

    A rename needs the same file system, and a mounted folder is one of its own.
    """
    closed = out.is_dir() and not os.access(out.parent, os.W_OK)
    return out if closed or os.path.ismount(out) else out.parent


def is_work_folder(name: str) -> bool:
    """Return whether a name is that of a work folder, of any output."""
    return re.fullmatch(r"\..*\.[0-9a-f]{16}\.prepare", name, re.DOTALL) is not None


def _make(parent: Path, out: Path, me: Owner, made: list[Path]) -> Path:
    """Make a new folder with its owner inside from the first moment that it has its name."""
    name = f".{out.name[:NAME_LETTERS]}.{secrets.token_hex(8)}"
    begun, path = parent / f"{name}.tmp", parent / f"{name}.prepare"
    made += (begun, path)
    # mkdir(2) follows no link and fails where there is anything of this name.
    begun.mkdir()
    text = to_json({"format": FORMAT, **asdict(me)}, indent=1) + "\n"
    (begun / OWNER).write_text(text, encoding="utf-8")
    (begun / DATASET).mkdir()
    begun.rename(path)
    return path


def _living(
    parent: Path, out: Path, say: Callable[[str], None], besides: Path | None = None
) -> Owner | None:
    """Return the owner of another work folder of `out`, after removing those of processes gone."""
    with suppress(OSError):
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            path = Path(entry.path)
            if path == besides or not is_work_folder(entry.name):
                continue
            owner = read_owner(path)
            if owner is None or owner.out != str(out) or entry.is_symlink():
                continue
            if owner.is_gone:
                shutil.rmtree(path, ignore_errors=True)
                say(f"removed {path}, left over by {owner.describe()}")
            elif _is_beating(path / OWNER):
                return owner
    return None


def read_owner(path: Path) -> Owner | None:
    """Read the owner of a work folder; None where it is no work folder of ours."""
    try:
        value = read_json(path / OWNER)
        return Owner(**value) if value.pop("format") == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_beating(owner: Path) -> bool:
    """Return whether the owner touched its file of late; a time in the future is none."""
    try:
        return abs(time.time() - owner.stat().st_mtime) < DEAD_SECONDS
    except OSError:
        return False


def _beat(owner: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(owner)


def _this_process(out: Path, prep: str) -> Owner:
    pid, since = os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Owner(socket.gethostname(), pid, birth_of(pid), process_space(), since, str(out), prep)
