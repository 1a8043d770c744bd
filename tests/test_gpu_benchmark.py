"""benchmarks/gpu.sh: what it does without a GPU, what it builds, and the page that it prints."""

import importlib.util
import io
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

from mpillm.comm.kernel import SOURCES, source_hash

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks/gpu"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"gpu_{name}", SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Its dataclasses look their module up.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


steps, losses = load("steps"), load("losses")


@pytest.mark.usefixtures("processes")
def test_without_a_gpu_it_says_so_and_is_done(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks/gpu.sh"), "--quick", "--json", str(tmp_path / "out.json")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no GPU to measure: torch ")
    assert done.stdout.count("\n") == 1


@pytest.mark.usefixtures("processes")
def test_the_module_is_built_as_meson_builds_it(tmp_path: Path) -> None:
    command = steps.build_command(SOURCES, tmp_path)
    assert f'-DMPILLM_SOURCE_HASH="{source_hash(SOURCES)}"' in command
    built = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=False)
    if built.returncode:
        pytest.skip(f"needs a C compiler with Python's headers: {built.stderr[:200]}")
    [made] = tmp_path.glob("mpillm/comm/_kernel*")
    code = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('mpillm.comm._kernel', {str(made)!r})\n"
        "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nprint(m.SOURCE_HASH)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == source_hash(SOURCES)


@pytest.mark.usefixtures("processes")
def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    log, environment = tmp_path / "log", {"PATH": "/usr/bin:/bin"}
    hangs = ["sh", "-c", "echo begun; sleep 61 & wait"]
    began = time.monotonic()
    assert steps.run_within(hangs, 1, environment, log, tmp_path) is None
    assert time.monotonic() - began < 10
    assert log.read_text() == "begun\n"
    assert steps.run_within(["sh", "-c", "exit 3"], 9, environment, log, tmp_path) == 3


def test_later_steps_keep_their_time(tmp_path: Path) -> None:
    job = steps.Job(False, "cpu", tmp_path, {}, time.monotonic() + 300)
    least = {name: limits.least[0] for name, limits in steps.LIMITS.items()}
    after_losses = sum(list(least.values())[3:])
    assert job.seconds_for("losses") == pytest.approx(min(110, 300 - after_losses), abs=1)
    for quick, whole in steps.WHOLE_SECONDS.items():
        assert sum(limits.least[quick] for limits in steps.LIMITS.values()) < whole
        assert whole < (180 if quick else 480)


def test_the_page_names_what_failed_and_what_was_left_out() -> None:
    result = {
        "date": "2026-11-30",
        "quick": True,
        "facts": {"chip": "NVIDIA H200, 140 GiB", "MPI": "Open MPI v5"},
        "losses": {"rows": [{"case": "1 rank", "found": "2.1e-06", "verdict": "ok"}]},
        "speed": {"shapes": [{"title": "GPT-2", "head": ["", "MFU"], "rows": [["mpillm", "51%"]]}]},
        "steps": [
            {"step": "facts", "failed": "", "seconds": 2.0},
            {"step": "speed", "failed": "longer than 75 s", "seconds": 75.0},
            {"step": "tests at 2 ranks", "left_out": "no mpirun"},
        ],
    }
    result["speed"]["shapes"][0]["notes"] = ["compiled: left out"]
    text = steps.page(result)
    for line in (
        "## NVIDIA H200, 140 GiB",
        "sh benchmarks/gpu.sh --quick",
        "| 1 rank | 2.1e-06 | ok |",
        "| mpillm | 51% |",
        "- compiled: left out",
        "| speed | failed: longer than 75 s |  | 75 s |",
        "| tests at 2 ranks | left out: no mpirun |  | 0 s |",
    ):
        assert line in text.splitlines(), line


def test_pytest_s_last_line_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("....\n31 passed, 2 skipped, 40 deselected in 12.30s\n")
    assert steps.counts(log) == "31 passed, 2 skipped, 40 deselected in 12.30s"
    assert steps.counts(tmp_path / "none") == ""


def test_cases_that_cannot_run_are_left_out_with_the_reason() -> None:
    runner = losses.Runner(Path("/nowhere"), "cuda", [])
    jobs = losses.jobs_of(runner, Namespace(quick=True, no_cupy=True), [1.0])
    assert jobs["2 ranks, data=2"] == "no mpirun and no mpiexec"
    runner.launcher = ["mpirun"]
    jobs = losses.jobs_of(runner, Namespace(quick=True, no_cupy=True), [1.0])
    assert jobs["2 ranks, data=2"] == "no CuPy, through which ranks send"
    assert not isinstance(jobs["1 rank"], str)
    with redirect_stdout(io.StringIO()):
        assert losses.row_of("a", "no CuPy")["verdict"] == "left out: no CuPy"
        assert losses.row_of("a", lambda: ("1e-02", False))["verdict"] == "wrong"

    def fails() -> tuple[str, bool]:
        raise losses.Failed("exit code 1\nout of memory")

    with redirect_stdout(io.StringIO()) as printed:
        assert losses.row_of("a", fails)["verdict"] == "failed: out of memory"
    assert "    exit code 1" in printed.getvalue()


def test_differences_are_relative() -> None:
    assert losses.largest_difference([2.0, 4.04], [2.0, 4.0]) == pytest.approx(0.01)
    with pytest.raises(losses.Failed, match="1 losses instead of 2"):
        losses.largest_difference([2.0], [2.0, 4.0])


def test_peaks_are_of_the_chip() -> None:
    speed = load("speed")
    for chip, peak in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ):
        assert speed.peak_flops(chip) == peak, chip
