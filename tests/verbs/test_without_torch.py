"""Every verb but training runs where torch, tensorboard and matplotlib are not installed.

The environment is a real one: a venv whose packages are links to the suite's own, without those
three.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

pytestmark = pytest.mark.usefixtures("processes")
ABSENT = ("torch", "functorch", "torchgen", "tensorboard", "matplotlib", "mpl_toolkits")
# What `mpillm bench` imports, with compiled parts: another Python may lack a build of one.
LOADED = "import h5py, mpi4py.MPI, numpy, rich, tokenizers, typer, xxhash, mpillm.comm.kernel"
SEEN = (
    "from importlib.util import find_spec\n"
    "print([name for name in ('torch', 'matplotlib', 'tensorboard') if find_spec(name)])"
)
FEW = ("--iterations", "2", "--warmup", "1")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pythons() -> list[str]:
    """Name the Pythons of this machine from 3.11 on: the suite's own first."""
    own = f"python3.{sys.version_info.minor}"
    others = [f"python3.{minor}" for minor in range(11, 20)]
    return [sys.executable, *(name for name in others if name != own and shutil.which(name))]


def make_environment(python: str, folder: Path) -> Path:
    """Make a venv in `folder`, with the suite's packages but ABSENT, and give its Python.

    Skips the test where `python` cannot make one.
    """
    made = subprocess.run(
        [python, "-m", "venv", "--without-pip", folder], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"{python} cannot make an environment")
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in ("purelib", "platlib"):
        for path in Path(sysconfig.get_path(name)).iterdir():
            left_out = path.name.startswith(ABSENT) or path.suffix == ".pth"
            if not left_out and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    # mpi4py searches its environment's own lib for the MPI of a wheel.
    for path in Path(sys.prefix, "lib").glob("lib*.so*"):
        (folder / "lib" / path.name).symlink_to(path)
    return folder / "bin/python"


@pytest.fixture(scope="module", params=pythons())
def bare(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, python: Run
) -> Run:
    """Run `mpillm ARGUMENTS…` on `ranks` processes of an environment without torch."""
    made = make_environment(request.param, tmp_path_factory.mktemp("bare"))
    tried = python("-c", LOADED, executable=made)
    if tried.returncode:
        pytest.skip(f"{request.param}: {tried.stderr.strip().splitlines()[-1]}")
    assert python("-c", SEEN, executable=made).stdout == "[]\n"

    def run(*arguments: str | Path, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
        return python("-m", "mpillm", *arguments, ranks=ranks, executable=made)

    return run


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Make a folder with a short text in it."""
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def measured(done: "subprocess.CompletedProcess[str]") -> tuple[list[dict[str, Any]], list[str]]:
    """Give the rows and the notes of a `mpillm bench … --json`."""
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    return [row for part in value["results"] for row in part["rows"]], value["notes"]


def test_bench_measures_collectives_without_gloo(bare: Run) -> None:
    rows, notes = measured(
        bare("bench", "allreduce", "--sizes", "1K", "--json", "--check", *FEW, ranks=2)
    )
    assert {"auto", "mpi", "ring"} <= {row["algorithm"] for row in rows}
    assert "gloo" not in {row["algorithm"] for row in rows}
    assert {row["wrong"] for row in rows} == {0, None}
    assert notes == ["left out: gloo: torch is not installed (pip install 'mpillm[train]')"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("overlap", "--sizes", "1K"), "gloo"),
        (("gemm", "--sizes", "16"), "by NumPy"),
        (("memory", "--sizes", "1K"), "by NumPy"),
        (("filesystem", "--sizes", "1K", "--folder", "{}"), "checkpoints are left out"),
    ],
)
def test_bench_measures_the_rest(
    bare: Run, place: Path, arguments: tuple[str, ...], part: str
) -> None:
    given = (argument.format(place) for argument in arguments)
    rows, notes = measured(bare("bench", *given, "--json", *FEW))
    assert rows
    assert [part in note and "mpillm[train]" in note for note in notes] == [True]


def test_bench_names_the_extra_that_an_option_needs(bare: Run, place: Path) -> None:
    refused = bare("bench", "gemm", "--dtype", "bfloat16", *FEW)
    assert_one_line(refused, "gemm in bfloat16 needs torch")
    plotted = bare("bench", "memory", "--sizes", "1K", "--plot", place / "a.png", *FEW)
    assert_one_line(plotted, "bench --plot needs matplotlib")


def test_prepare_at_two_ranks(bare: Run, place: Path) -> None:
    arguments = ("--out", place / "data", "--tokenizer", "bytes", "--validation", "0")
    done = bare("prepare", place / "text.txt", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert bare("prepare", "--verify", place / "data").returncode == 0


def test_doctor_names_the_extra_and_finds_no_fault_in_it(bare: Run, place: Path) -> None:
    rows = json.loads(bare("doctor", place, "--json").stdout)["findings"]
    (torch,) = (row for row in rows if row["name"] == "torch")
    assert torch["verdict"] == "ok"
    assert "pip install 'mpillm[train]'" in torch["remedy"]
    software = [row for row in rows if row["area"] == "software" and row["verdict"] == "error"]
    assert software == []


def test_schedule_status_and_submit(bare: Run, place: Path) -> None:
    done = bare("schedule", "1f1b", "--ranks", "2", "--microbatches", "4")
    assert done.returncode == 0, done.stderr
    png = ("--ranks", "2", "--microbatches", "4", "--png", place / "a.png")
    assert_one_line(bare("schedule", "1f1b", *png), "this needs matplotlib")
    assert_one_line(bare("status", place / "none"), "none")
    recipe = place / "recipe.toml"
    recipe.write_text(f'[data]\npath = "{place}/data"\n[train]\nrun = "{place}/run"\nsteps = 4\n')
    asked = ("--nodes", "1", "--ranks-per-node", "2", "--time", "10m", "--dry-run")
    submitted = bare("submit", recipe, *asked, "--scheduler", "slurm")
    assert submitted.returncode == 0, submitted.stderr
    assert "#SBATCH" in submitted.stdout


def test_a_dry_run_needs_no_torch(bare: Run, place: Path) -> None:
    recipe = place / "recipe.toml"
    recipe.write_text(f'[data]\npath = "{place}/data"\n[train]\nrun = "{place}/run"\n')
    prepared = ("--out", place / "data", "--tokenizer", "bytes", "--validation", "0")
    assert bare("prepare", place / "text.txt", *prepared).returncode == 0
    asked = ("--dry-run", "--nodes", "2", "--ranks-per-node", "2", "--json")
    done = bare("train", recipe, *asked, "--set", "parallel.pipeline=2")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["mesh"].keys() == {"data", "pipeline"}
    assert len(table["ranks"]) == 4
    started = bare("train", recipe, "--dry-run", ranks=2)
    assert started.returncode == 0, started.stderr
    assert "on 2 ranks, 1 host" in started.stdout
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (1, ("train", "recipe.toml")),
        (2, ("train", "recipe.toml")),
        (1, ("evaluate", "run")),
        (1, ("generate", "run", "--prompt", "")),
    ],
)
def test_training_ends_in_one_line(bare: Run, ranks: int, arguments: tuple[str, ...]) -> None:
    assert_one_line(bare(*arguments, ranks=ranks), f"mpillm {arguments[0]} needs torch", ranks)


def assert_one_line(done: "subprocess.CompletedProcess[str]", words: str, ranks: int = 1) -> None:
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpillm: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    # Under mpirun the launcher adds words of its own.
    assert ranks > 1 or len(done.stderr.splitlines()) == 1


def test_versions_say_what_is_not_installed(bare: Run) -> None:
    done = bare("--version", "--verbose")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["torch"])
    assert "not installed" in line
    assert MPI.Get_library_version().split("\n")[0].strip("\0 ")[:8] in done.stdout


def test_the_environment_holds_links_and_no_copies(tmp_path: Path) -> None:
    made = make_environment(sys.executable, tmp_path / "bare")
    (packages,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    assert os.access(made, os.X_OK)
    assert all(path.is_symlink() for path in packages.iterdir())
    assert not [path.name for path in packages.iterdir() if path.name.startswith(ABSENT)]
