"""A checkout runs its own .py files with the compiled module of the installed package."""

import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# The folder that a command is started in comes first, as for a contributor.
HERE = {"PYTHONPATH": "", "PYTHONSAFEPATH": ""}
SCRIPT = """
import numpy
from mpi4py import MPI
from mpillm import errors
from mpillm.comm.communicator import Communicator
total = numpy.ones(1000, numpy.float32)
Communicator(MPI.COMM_WORLD).allreduce(total, algorithm="shared")
print(errors.EDITED, int(total[0]), flush=True)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package's sources, without any compiled module."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "mpillm", tmp_path / "mpillm", ignore=ignored)
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 4])
def test_an_edited_file_is_what_every_rank_runs(python: Any, checkout: Path, ranks: int) -> None:
    with (checkout / "mpillm" / "errors.py").open("a") as file:
        file.write("\nEDITED = 'edited'\n")
    done = python("-c", SCRIPT, ranks=ranks, cwd=checkout, **HERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"edited {ranks}"] * ranks
    # Nothing was rebuilt, and nothing was left in the checkout.
    assert not list((checkout / "mpillm").rglob("*.so"))


def test_python_m_mpillm_runs_the_checkout(python: Any, checkout: Path) -> None:
    catalog = checkout / "mpillm" / "verbs" / "verb_catalog.py"
    text = catalog.read_text()
    catalog.write_text(text.replace('"prepare":', '"ready":'))
    assert catalog.read_text() != text
    done = python("-m", "mpillm", "--help", cwd=checkout, **HERE)
    assert " ready " in done.stdout, done.stderr
