"""The search of folders: what is read, what is passed over and counted, what is refused."""

import os
import socket
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.text.source_search import GlobPattern, PassedOver, find_files, our_kind

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")


def found(folder: Path, glob: str = "**/*", passed: PassedOver | None = None) -> list[str]:
    files = find_files([str(folder)], glob, None, passed or PassedOver())
    return [str(Path(file.path).relative_to(folder)) for file in files]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Make a folder of everything that may be in one."""
    odd = tmp_path / "odd"
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.md", ".git/config", "sub/.hidden"):
        (odd / name).parent.mkdir(parents=True, exist_ok=True)
        (odd / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.txt").write_text("linked")
    for name, target in (
        ("loop", "."),
        ("up", ".."),
        ("folder", "../elsewhere"),
        ("file.txt", "../elsewhere/linked.txt"),
        ("broken.txt", "nowhere"),
        ("self.txt", "self.txt"),
    ):
        (odd / name).symlink_to(target)
    os.mkfifo(odd / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(odd / "socket.txt"))
    return odd


def test_all_kinds_are_read_or_counted(odd: Path) -> None:
    passed = PassedOver()
    assert found(odd, passed=passed) == ["a.txt", "file.txt", "sub/b.txt", "sub/deep/c.md"]
    assert passed.text() == "3 links to folders, 2 broken links, 2 hidden, 1 pipe, 1 socket"
    # A search for other names still names the linked folders, and only those.
    narrow = PassedOver()
    assert found(odd, "**/*.md", narrow) == ["sub/deep/c.md"]
    assert narrow.text() == "3 links to folders, 2 hidden"


@pytest.mark.parametrize(
    ("glob", "matching"),
    [
        ("**", ["a.txt", "d/b.txt", "d/e/c.md"]),
        ("**/*", ["a.txt", "d/b.txt", "d/e/c.md"]),
        ("*", ["a.txt"]),
        ("./*.txt", ["a.txt"]),
        ("d/**", ["d/b.txt", "d/e/c.md"]),
        ("d/*", ["d/b.txt"]),
        ("**/e/*", ["d/e/c.md"]),
        ("**/d/**/*.md", ["d/e/c.md"]),
        ("*/[a-b].tx?", ["d/b.txt"]),
        ("**/**/**/c.md", ["d/e/c.md"]),
        ("**/nope", []),
    ],
)
def test_globs(glob: str, matching: list[str]) -> None:
    pattern = GlobPattern(glob)
    names = ["a.txt", "d/b.txt", "d/e/c.md"]
    assert [name for name in names if pattern.matches(name)] == matching


def test_no_glob_takes_exponential_time() -> None:
    assert not GlobPattern("**/a/" * 30 + "b").matches("a/" * 300 + "c")


@pytest.mark.parametrize("glob", ["", "/", ".", "/etc/*", "../*", "a/../b", "**.txt", "a/b**"])
def test_a_glob_that_is_none(glob: str) -> None:
    with pytest.raises(UsageError, match=r"is not a pattern: .*; write one like"):
        GlobPattern(glob)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "a source is an empty text, perhaps a shell variable"),
        ("-", "standard input is none; write it to a file"),
        ("odd/pipe.txt", "is a pipe, .*; write it to a file first"),
        ("odd/socket.txt", "is a socket"),
        ("/dev/null", "is a device"),
        ("/dev/stdin", "the source /dev/stdin is "),
        ("/proc/self/status", "is an open file of a process"),
        ("odd/broken.txt", r"there is no source odd/broken\.txt \(it is a broken link\)"),
        ("odd/self.txt", "lead in a circle"),
        ("x" * 300, "choose a shorter name"),
        ("a\0b", "null"),
        ("odd/a.txt/b", "a part of it is a file"),
        ("odd/no\nthing", r"no source odd/no\\nthing"),
    ],
)
def test_a_source_that_is_none(odd: Path, name: str, says: str, monkeypatch) -> None:
    monkeypatch.chdir(odd.parent)
    with pytest.raises(UsageError, match=says):
        find_files([name], "**/*", None, PassedOver())


def test_what_is_ours_is_passed_over_inside_and_refused_by_name(odd: Path) -> None:
    quiet = Console(False)
    prepare(PrepareOptions((str(odd / "sub"),), odd / "data", "bytes"), MPI.COMM_SELF, quiet)
    for name, files in (
        ("run", {"recipe.toml": "", "history.jsonl": "", "notes.txt": "x"}),
        ("step", {"index.json": '{\n "format": "mpillm.checkpoint",\n "version": 1}'}),
        ("recipe", {"recipe.toml": "[a]", "manifest.json": '{"format": "of others"}'}),
    ):
        (odd / name).mkdir()
        for file, text in files.items():
            (odd / name / file).write_text(text)
    passed = PassedOver()
    names = found(odd, passed=passed)
    assert {name.split("/")[0] for name in names} == {"a.txt", "file.txt", "sub", "recipe"}
    kinds = ("dataset of mpillm", "run of mpillm", "checkpoint of mpillm")
    assert [passed.counts[kind] for kind in kinds] == [1, 1, 1]
    for name, says in (
        ("data", "a dataset of mpillm, not text; train on it as it is"),
        ("run", "a run of mpillm, not text"),
        ("step", "a checkpoint of mpillm, not text"),
    ):
        with pytest.raises(UsageError, match=says):
            found(odd / name)
    assert our_kind(odd / "recipe") == ""


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UsageError, match=r"cannot list the folder .*closed: Permission denied"):
        found(tmp_path)


def test_a_report_counts_and_names_endings() -> None:
    passed = PassedOver()
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.v2.gz", "d.zst", "e.xz"):
        passed.add("compressed", name)
    passed.add("binary", "no ending")
    passed.add("binary", "a.x\n\x1by")
    passed.add("pipe")
    passed.counts["picture or sound"] += 1200
    assert passed.text() == (
        "1,200 pictures or sounds, 5 compressed (.jsonl.gz, .v2.gz, .xz, …), "
        r"2 binary (.x\n\x1by), 1 pipe"
    )
