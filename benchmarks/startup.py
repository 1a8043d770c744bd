"""Measure a start: from mpirun to the end of the first step, and `mpillm --help`.

    python benchmarks/startup.py [--ranks 2] [--rounds 7]

The first is compared with the bare imports under the same mpirun, the second with the import of
torch. They take turns, so that a busy machine slows both.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

IMPORTS = "import torch, mpi4py.MPI, h5py"
RECIPE = """
[model]
layers = 2
width = 64
heads = 4
context = 64
[data]
path = "data"
[train]
run = "run"
steps = 100000
batch = 8
"""
LONGEST_SECONDS = 120


def launcher(ranks: int) -> list[str]:
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    if not Path(mpirun).exists():
        mpirun = shutil.which("mpirun") or "mpiexec"
    version = subprocess.run(
        [mpirun, "--version"], text=True, capture_output=True, check=False
    ).stdout
    more = (
        ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        if "Open MPI" in version or "prte" in version
        else []
    )
    return [mpirun, "-n", str(ranks), *more, sys.executable]


def whole(command: Sequence[str]) -> float:
    """Measure the seconds of a command from its start to its end."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - begun


def first_step(command: Sequence[str], folder: Path) -> float:
    """Measure the seconds until a run records its first step; then stop it."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics = folder / "run/metrics.jsonl"
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - begun > LONGEST_SECONDS:
                process.kill()
                raise SystemExit(f"no first step: {process.communicate()[1].decode()}")
            time.sleep(0.002)
        seconds = time.perf_counter() - begun
        process.terminate()
        process.communicate()
    return seconds


def compare(name: str, one: Callable[[], float], other: Callable[[], float], rounds: int) -> None:
    """Compare `one` with `other`, in turns; the first round warms up and does not count."""
    pairs = [(one(), other()) for _ in range(rounds + 1)][1:]
    ratios = sorted(a / b for a, b in pairs)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    print(
        f"{name}: {medians[0]:.2f} s over {medians[1]:.2f} s, ratio by round "
        f"[{ratios[0]:.2f}..{statistics.median(ratios):.2f}..{ratios[-1]:.2f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.geteuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    mpirun, verb = launcher(options.ranks), ["-m", "mpillm"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 2000)
        (folder / "recipe.toml").write_text(RECIPE)
        prepare = [
            "prepare",
            "text.txt",
            "--out",
            "data",
            "--tokenizer",
            "bytes",
            "--validation",
            "0",
        ]
        subprocess.run(
            [sys.executable, *verb, *prepare], cwd=folder, check=True, capture_output=True
        )
        compare(
            f"mpirun -n {options.ranks} to the end of the first step, over {IMPORTS!r}",
            lambda: first_step([*mpirun, *verb, "train", "recipe.toml"], folder),
            lambda: whole([*mpirun, "-c", IMPORTS]),
            options.rounds,
        )
        compare(
            "mpillm --help over 'import torch'",
            lambda: whole([sys.executable, *verb, "--help"]),
            lambda: whole([sys.executable, "-c", "import torch"]),
            options.rounds,
        )


if __name__ == "__main__":
    main()
