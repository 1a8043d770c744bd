"""The files that a verb will write are tried first, whatever they are."""

import os
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.system.atomic import check_outputs


def test_plain_files_links_devices_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "target")
    named = {
        "--a": tmp_path / "new" / "folder" / "a",
        "--b": Path("/dev/stdout"),
        "--c": None,
        "--d": tmp_path / "pipe",
        "--e": tmp_path / "link",
        "--f": Path("/dev/null"),
        "--g": Path("/dev/null"),
    }
    assert check_outputs(named) == [path for path in named.values() if path]
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert (tmp_path / "deep").is_dir()
    assert (tmp_path / "link").is_symlink()


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "file" / "x", "cannot write into the folder"),
        (Path("/proc/none/x"), "it is not there"),
        (Path("/dev/none"), "it is not there"),
    ):
        with pytest.raises(UsageError, match=f"--csv.* {words}"):
            check_outputs({"--csv": path})
    with pytest.raises(UsageError, match="is no folder; make it"):
        check_outputs({"--csv": tmp_path / "new" / "x"}, make_folders=False)
    with pytest.raises(UsageError, match="--csv and --save both name"):
        check_outputs({"--csv": tmp_path / "x", "--save": tmp_path / "." / "x"})
