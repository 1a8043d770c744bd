"""A file is whole or absent, whatever happens while it is written."""

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.system.atomic import flush, make_folder, replacing, write_json, write_text
from mpillm.system.json_text import from_json, read_json

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# A child may write 4,096 bytes a file, as if the disk were full: Python raises OSError then.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mpillm.system.atomic import write_text
from mpillm.system.json_text import from_json, read_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_text(Path(sys.argv[1]), "x" * 100_000)
except OSError as failure:
    print(type(failure).__name__, failure.errno)
"""


def write_half(path: Path, failure: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_writes_beside_and_renames(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure):
        write_half(path, failure())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_first_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"):
        write_half(tmp_path / "a.txt", ValueError("half"))
    assert names(tmp_path) == []


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_rename_that_fails_is_told_and_tidied(tmp_path: Path) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="a"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "a.txt", "text")


@pytest.mark.usefixtures("processes")
def test_a_full_disk_leaves_the_old_file(python: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = python("-c", FULL_DISK, path)
    assert done.stdout.startswith("OSError"), done.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_is_readable_by_people_and_ends_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "Größe", "counts": [1, 2]}
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Größe" in text
    assert text.endswith("}\n")


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"path": path})
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["a.json"]


def test_the_file_has_the_modes_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_flush_takes_files_and_folders_and_leaks_no_descriptor(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "text")
    before = len(names(Path("/proc/self/fd")))
    for _ in range(10):
        flush(tmp_path)
        flush(tmp_path / "a.txt")
    assert len(names(Path("/proc/self/fd"))) == before
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")


def test_make_folder_makes_parents_and_leaves_no_probe(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_make_folder_refuses_a_file(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(
        UsageError, match=rf"cannot write into the folder .*{path}: .*; choose a folder"
    ):
        make_folder(tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_make_folder_refuses_a_folder_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            make_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link").symlink_to("target.txt")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"
    assert names(tmp_path) == ["link", "target.txt"]


def test_a_pipe_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(path, "new")
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_pipe_in_place_of_a_file_of_ours_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "outcome"
    os.mkfifo(path)
    with pytest.raises(OSError, match="it is no plain file"):
        write_text(path, "new", plain=True)
    assert names(tmp_path) == ["outcome"]


@pytest.mark.usefixtures("processes")
def test_standard_output_keeps_what_it_holds(python: Run) -> None:
    code = "write_text(Path('/dev/stdout'), 'second'); print('third')"
    head = "from pathlib import Path; from mpillm.system.atomic import write_text"
    done = python("-c", f"{head}; print('first', flush=True); {code}")
    assert done.stdout == "first\nsecondthird\n"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127], ids=["ascii", "utf-8"])
def test_the_longest_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def test_temporary_names_differ(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.touch()
        second.touch()
    assert names(tmp_path) == ["a"]


def test_json_holds_no_nan_and_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    name = os.fsdecode(b"caf\xe9")
    write_json(path, {"loss": float("nan"), "rates": (float("inf"), 1.5), "name": name})
    assert read_json(path) == {"loss": None, "rates": [None, 1.5], "name": name}


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "9" * 5_000])
def test_what_json_cannot_be_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        from_json(text)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_json_is_read_from_plain_files_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    with pytest.raises(OSError, match=f"it is a {kind}"):
        read_json(path)
