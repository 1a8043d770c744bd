"""A file that hides an installed package is named, with a cure that cures."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mpillm.system.shadowing import explain_hidden, hidden_packages


def test_the_suite_itself_hides_nothing() -> None:
    assert hidden_packages() == {}
    assert explain_hidden({}) == ("", "")


@pytest.mark.parametrize("name", ["xxhash", "tensorboard"])
def test_a_file_in_a_folder_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = hidden_packages()
    assert found == {name: (tmp_path / f"{name}.py").resolve()}
    text, remedy = explain_hidden(found)
    assert text == f"{tmp_path / name}.py hides the installed {name}"
    assert remedy == "rename it, or unset PYTHONPATH"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("numpy", ("bench", "gemm", "--sizes", "16")),
        ("typer", ("--help",)),
        ("torch", ("bench", "gemm", "--sizes", "16")),
    ],
)
def test_a_verb_names_the_file(mpillm: Any, tmp_path: Path, name: str, words: Any) -> None:
    """PYTHONPATH=: is the usual $PYTHONPATH:/x where PYTHONPATH is empty."""
    (tmp_path / f"{name}.py").write_text("")
    root = Path(__file__).parents[2]
    done = mpillm(*words, cwd=tmp_path, PYTHONPATH=f":{root}")
    assert done.returncode == 1
    assert f"{tmp_path / name}.py hides the installed {name} (" in done.stderr
    assert done.stderr.endswith("; rename it, or unset PYTHONPATH\n")
    assert "Traceback" not in done.stderr
