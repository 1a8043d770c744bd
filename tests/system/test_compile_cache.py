"""The compiler's folder is private, and stays for the next start."""

import stat
import tempfile
from pathlib import Path

import pytest

from mpillm.system.compile_cache import VARIABLE, find_compiler, set_compile_cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_the_same_at_each_start() -> None:
    environment: dict[str, str] = {}
    first = set_compile_cache(environment)
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    assert environment[VARIABLE] == str(first)
    assert set_compile_cache({}) == first


def test_a_name_of_the_user_s_is_kept(tmp_path: Path) -> None:
    environment = {VARIABLE: str(tmp_path / "mine")}
    assert set_compile_cache(environment) == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("harm", ["open", "link", "file"])
def test_what_others_can_write_to_is_not_used(tmp_path: Path, harm: str) -> None:
    taken = set_compile_cache({})
    taken.rmdir()
    if harm == "open":
        taken.mkdir()
        taken.chmod(0o777)
    elif harm == "link":
        (tmp_path / "elsewhere").mkdir()
        taken.symlink_to("elsewhere")
    else:
        taken.touch()
    other = set_compile_cache({})
    assert other != taken
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    assert not list(other.iterdir())


def test_a_compiler_is_found_by_its_name(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert find_compiler({"PATH": str(tmp_path)}) == str(compiler)
    assert find_compiler({"PATH": str(tmp_path / "none")}) == ""
    assert find_compiler({"PATH": "", "CXX": str(compiler)}) == str(compiler)
