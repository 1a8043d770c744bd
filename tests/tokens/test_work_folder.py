"""Jobs that prepare one folder: one does it, the others find it made; what was left over goes."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.system.console import Console
from mpillm.system.processes import birth_of, process_space
from mpillm.tokens import prepare as preparing
from mpillm.tokens import work_folder as room
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.verify import verify

QUIET = Console(False)
Say = list[str]


def left_by(out: Path, **facts: Any) -> Path:
    """Leave a work folder of `out` as a process with these facts would."""
    me = room._this_process(out, '"prep"')
    path = room._make(out.parent, out, replace(me, **facts), [])
    (path / "tokens-00000").write_bytes(b"many")
    return path


def test_the_name_cannot_be_predicted_and_links_are_not_followed(tmp_path: Path) -> None:
    names = {room.take(tmp_path / f"{i}" / "out", "{}", print, []).path.name for i in range(20)}
    assert len(names) == 20
    assert all(room.is_work_folder(name) for name in names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("mine")
    # The name that earlier versions used, and a work folder's: a link is neither used nor removed.
    for name in (".out.partial", f".out.{'0' * 16}.prepare"):
        (tmp_path / name).symlink_to(elsewhere)
    work = room.take(tmp_path / "out", "{}", print, [])
    assert not work.path.is_symlink()
    assert (elsewhere / "x").read_text() == "mine"


def test_what_was_killed_while_it_made_or_removed_its_folder_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    digits = "0123456789abcdef"
    removing = tmp_path / f".out.{digits}.prepare"
    removing.mkdir()
    making, just_now = tmp_path / f".out.{digits}.tmp", tmp_path / f".out.{digits[::-1]}.tmp"
    another, full = tmp_path / f".other.{digits}.tmp", tmp_path / f".full.{digits}.prepare"
    for path in (making, just_now, another, full):
        path.mkdir()
    (full / "mine").write_text("text")
    begun = left_by(out, birth="1").rename(tmp_path / f".out.{'1' * 16}.tmp")
    living = left_by(out).rename(tmp_path / f".out.{'2' * 16}.tmp")
    past = time.time() - 2 * room.DEAD_SECONDS
    for path in (making, another):
        os.utime(path, (past, past))
    room.take(out, "{}", print, [])
    assert not any(path.exists() for path in (removing, making, begun))
    assert all(path.exists() for path in (just_now, another, full / "mine", living))


def test_what_was_left_is_removed_where_the_dataset_is_made_already(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n" * 50)
    options = PrepareOptions((str(tmp_path / "text.txt"),), tmp_path / "out", vocab_size=260)
    prepare(options, MPI.COMM_SELF, QUIET)
    dead = left_by(tmp_path / "out", birth="1")
    prepare(options, MPI.COMM_SELF, QUIET)
    assert not dead.exists()


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    said: Say = []
    out = tmp_path / "out"
    dead = left_by(out, birth="1")
    ours = room.take(out, "{}", said.append, [])
    assert not dead.exists()
    assert ours.path.exists()
    assert f"removed {dead}, left over by process {os.getpid()}" in said[0]


@pytest.mark.parametrize(
    "change",
    [
        # A folder of this name that somebody else made, and one of another output.
        lambda path: (path / "owner.json").write_text("{}"),
        lambda path: (path / "owner.json").unlink(),
        lambda path: (path / "owner.json").write_text("[" * 5000),
        lambda path: (path / "owner.json").write_text(
            (path / "owner.json").read_text().replace("/out", "/other")
        ),
        lambda path: (path / "owner.json").write_text(
            (path / "owner.json").read_text().replace(room.FORMAT, "theirs")
        ),
    ],
)
def test_what_is_not_known_to_be_ours_stays(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = left_by(tmp_path / "out", birth="1")
    change(path)
    room.take(tmp_path / "out", "{}", print, [])
    assert (path / "tokens-00000").read_bytes() == b"many"


def test_a_folder_of_another_host_blocks_while_it_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    far = left_by(out, host="far", space="another", birth="1")
    with pytest.raises(UsageError, match=r"another job prepares .*process \d+ on far, since"):
        room.take(out, "{}", print, [])
    # No user can set the change of an inode: a date in the future is not believed.
    os.utime(far / "owner.json", (time.time() + 1e6,) * 2)
    with pytest.raises(UsageError, match="another job prepares"):
        room.take(out, "{}", print, [])
    # Silent for two minutes: removed, and said once.
    said: Say = []
    os.utime(far / "owner.json", (time.time() - 130,) * 2)
    room.take(out, "{}", said.append, [])
    assert not far.exists()
    assert len(said) == 1
    assert f"removed {far}, left over by process" in said[0]


def test_the_clock_of_the_file_system_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host's clock may be an hour ahead."""
    out = tmp_path / "out"
    left_by(out, host="far", space="another", birth="1")
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + 3600)
    with pytest.raises(UsageError, match="another job prepares"):
        room.take(out, "{}", print, [])


def test_nothing_is_said_of_what_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Say = []
    dead = left_by(tmp_path / "out", birth="1")

    def refuse(self: Path, target: Path) -> Path:
        if self == dead:
            raise PermissionError(1, "not yours")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    room.take(tmp_path / "out", "{}", said.append, [])
    assert dead.exists()
    assert said == []


def test_a_job_that_was_suspended_publishes_nothing(tmp_path: Path) -> None:
    """Its folder was removed, or another job lives."""
    out = tmp_path / "out"
    work = room.take(out, "{}", print, [])

    def refused() -> None:
        with (
            pytest.raises(UsageError, match=r"another job .* in place of this one"),
            room.alone(work, out, print),
        ):
            pytest.fail("it is not alone")

    dead = left_by(out, birth="1")
    with room.alone(work, out, print):
        assert not dead.exists()
    other = left_by(out)
    refused()
    shutil.rmtree(other)
    room._remove(work.path)
    refused()
    assert list(tmp_path.iterdir()) == []


def test_one_job_publishes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    work, order = room.take(out, "{}", print, []), []

    def second() -> None:
        with room.alone(work, out, print):
            order.append("second")

    with room.alone(work, out, print):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    # A lock of a dead process, and one whose owner is not known.
    lock = tmp_path / ".out.publish.prepare"
    left_by(out, birth="1").rename(lock)
    with room.alone(work, out, print):
        assert room.read_owner(lock) == work.owner
    lock.mkdir()
    (lock / "theirs").touch()
    monkeypatch.setattr(room, "DEAD_SECONDS", 0.1)
    with (
        pytest.raises(UsageError, match="remove it if no job prepares"),
        room.alone(work, out, print),
    ):
        pytest.fail("the lock is held")
    assert (lock / "theirs").exists()


def test_the_same_options_wait(tmp_path: Path) -> None:
    said: Say = []
    out = tmp_path / "out"
    other = room.take(out, "{}", print, [])
    threading.Timer(0.5, lambda: other.path.rename(tmp_path / "done")).start()
    work = room.take(out, "{}", said.append, [])
    assert work.waited
    assert len(said) == 1
    assert f"({room.read_owner(work.path).describe()}): wait" in said[0]  # type: ignore[union-attr]


def test_a_beat_keeps_the_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BEAT_SECONDS", 0.05)
    with room.work_folder(tmp_path / "out", {}, MPI.COMM_SELF, QUIET) as work:
        owner = work.path / "owner.json"
        os.utime(owner, (0, 0))
        deadline = time.monotonic() + 10
        while owner.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert owner.stat().st_mtime > 0
    assert not work.path.exists()


def test_a_process_is_known_by_its_birth() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    born = birth_of(child)
    assert born
    assert born != birth_of(1)
    os.kill(child, 9)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    # A zombie runs no more.
    assert birth_of(child) == ""
    os.waitpid(child, 0)
    assert birth_of(child) == ""
    assert process_space() == process_space()


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number}\n" * 50)
    return str(tmp_path / "texts")


def forked(work: Callable[[], int]) -> int:
    """Run `work` in a child of this process, which needs no MPI of its own; return its number."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def prepare_as(options: PrepareOptions, delay: float) -> int:
    time.sleep(delay)
    try:
        prepare(options, MPI.COMM_SELF, QUIET)
    except UsageError as failure:
        expected = ("another job prepares", "was prepared otherwise")
        return 2 if any(words in str(failure) for words in expected) else 3
    return 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("processes")
def test_several_jobs_at_once(tmp_path: Path, texts: str, seed: int) -> None:
    """Two with equal options both find their dataset; of two with others, one is refused."""
    chance = random.Random(seed)
    out = tmp_path / "out"
    same = [PrepareOptions((texts,), out, "bytes", workers=1) for _ in range(2)]
    other = PrepareOptions((texts,), out, "bytes", workers=1, seed=7)
    jobs = [*same, other] if seed % 2 else same
    children = [
        forked(lambda job=job: prepare_as(job, chance.uniform(0, 0.02)))  # type: ignore[misc]
        for job in jobs
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    won = Manifest.load(out).prep["seed"]
    assert codes == [0 if job.seed == won else 2 for job in jobs]
    verify(out, MPI.COMM_SELF, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("processes")
def test_a_killed_job_leaves_what_the_next_removes(tmp_path: Path, texts: str, seed: int) -> None:
    options = PrepareOptions((texts,), tmp_path / "out", "bytes", workers=1)
    child = forked(lambda: prepare_as(options, 0))
    time.sleep(random.Random(seed).uniform(0.0, 0.05))
    os.kill(child, 9)
    os.waitpid(child, 0)
    prepare(options, MPI.COMM_SELF, QUIET)
    verify(tmp_path / "out", MPI.COMM_SELF, QUIET)
    # A folder that has no owner yet is not known to be ours.
    left = [path for path in tmp_path.iterdir() if path.name not in ("out", "texts")]
    assert all(path.name.endswith(".tmp") and not any(path.iterdir()) for path in left)


def test_the_owner_is_json(tmp_path: Path) -> None:
    work = room.take(tmp_path / "out", "{}", print, [])
    value = json.loads((work.path / "owner.json").read_text())
    owner = room.read_owner(work.path)
    assert owner is not None
    assert value == {"format": room.FORMAT, **asdict(owner)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_published_meanwhile_stays(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """A job that took this one for dead ended before this one continued."""
    options = PrepareOptions((texts,), tmp_path / "out", "bytes", workers=1, overwrite=overwrite)
    write = preparing._write

    def suspended(*given: Any) -> Manifest:
        made = write(*given)
        monkeypatch.setattr(preparing, "_write", write)
        prepare(replace(options, out=tmp_path / "other", seed=7), MPI.COMM_SELF, QUIET)
        if overwrite:
            shutil.rmtree(tmp_path / "out")
        (tmp_path / "other").rename(tmp_path / "out")
        return made

    if overwrite:
        prepare(options, MPI.COMM_SELF, QUIET)
    monkeypatch.setattr(preparing, "_write", suspended)
    with pytest.raises(UsageError, match="was prepared otherwise"):
        prepare(options, MPI.COMM_SELF, QUIET)
    assert verify(tmp_path / "out", MPI.COMM_SELF, QUIET).prep["seed"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]
