"""Compare one recipe's losses on GPUs with those of the CPU, in several layouts and dtypes.

    python benchmarks/gpu/losses.py --launcher mpirun [--quick] --out losses.json

Each run is the command that a user types, in a process of its own. Ranks share one GPU.
"""

import argparse
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

STEPS, RUN_SECONDS = 20, 60
# Sums in another order differ by rounding, which 20 steps of training amplify.
TOLERANCE = {"float32": 5e-4, "bfloat16": 3e-2, "float16": 1e-2}
RECIPE = f"""
[model]
layers = 4
width = 64
heads = 4
kv_heads = 2
context = 128

[data]
path = "data"

[optimizer]
learning_rate = 3e-3
warmup_steps = 5

[train]
steps = {STEPS}
batch = 8
microbatch = 1
dtype = "float32"
share_gpu = true
"""


@dataclass(frozen=True)
class Case:
    """A run on GPUs: its settings beside the recipe's."""

    name: str
    ranks: int = 1
    settings: tuple[str, ...] = ()
    dtype: str = "float32"
    quick: bool = True
    """Whether a quick run has it, too."""
    needs_cupy: bool = False

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


CASES = (
    Case("1 rank"),
    Case("2 ranks, data=2", 2, ("parallel.data=2",), needs_cupy=True),
    Case("2 ranks, pipeline=2", 2, ("parallel.pipeline=2",), needs_cupy=True),
    Case("1 rank, bfloat16", dtype="bfloat16"),
    Case("1 rank, float16", dtype="float16", quick=False),
    Case("2 ranks, data=2, bfloat16", 2, ("parallel.data=2",), "bfloat16", False, needs_cupy=True),
    Case(
        "2 ranks, pipeline=2, zb-h1",
        2,
        ("parallel.pipeline=2", "parallel.schedule=zb-h1"),
        quick=False,
        needs_cupy=True,
    ),
)
# Attention's backward pass adds up in any order unless the order is fixed.
RESUMED = ("train.fixed_order=true", "train.save_every=10")

Job = Callable[[], tuple[str, bool]]
"""Returns what was found, and whether that is right."""


class Failed(Exception):
    """A command that failed, with the end of what it printed."""


class Runner:
    """Runs mpillm in `folder` by one rank or by several."""

    def __init__(self, folder: Path, device: str, launcher: Sequence[str]) -> None:
        self.folder, self.device, self.launcher = folder, device, launcher

    def mpillm(self, *arguments: str, ranks: int = 1) -> str:
        """Run a verb; return what it printed to stdout. Raises Failed."""
        start = [*self.launcher, "-n", str(ranks)] if ranks > 1 else []
        command = [*start, sys.executable, "-B", "-m", "mpillm", *arguments]
        # A rank of the CPU takes one core: the machine's others are for the other runs.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                text=True,
                capture_output=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as failure:
            raise Failed(f"longer than {RUN_SECONDS} s") from failure
        if done.returncode:
            last = done.stderr.strip().splitlines()[-6:]
            raise Failed("\n".join([f"exit code {done.returncode}", *last]))
        return done.stdout

    def train(self, run: str, device: str, *settings: str, ranks: int = 1) -> list[float]:
        """Train; return the losses of all steps."""
        given = [f"train.run={run}", f"train.device={device}", *settings]
        words = [word for setting in given for word in ("--set", setting)]
        self.mpillm("train", "recipe.toml", *words, ranks=ranks)
        return self.losses(run)

    def losses(self, run: str) -> list[float]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    if len(found) != len(expected):
        raise Failed(f"{len(found)} losses instead of {len(expected)}")
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


def compared(runner: Runner, case: Case, expected: Sequence[float]) -> tuple[str, bool]:
    """Run a case; return its difference from the CPU's losses, and whether it is small."""
    settings = (f"train.dtype={case.dtype}", *case.settings)
    found = runner.train(case.folder, runner.device, *settings, ranks=case.ranks)
    difference = largest_difference(found, expected)
    return f"{difference:.1e}", difference < TOLERANCE[case.dtype]


def resumed(runner: Runner, dtype: str) -> tuple[str, bool]:
    """Train, remove the last checkpoint, resume; compare weights, state and losses bit for bit."""
    run = f"resumed-{dtype}"
    settings = (f"train.dtype={dtype}", *RESUMED)
    first = runner.train(run, runner.device, *settings)
    last = runner.folder / run / "checkpoints" / f"step-{STEPS:08d}"
    before = tensors_of(last)
    shutil.rmtree(last)
    words = [f"train.run={run}", f"train.device={runner.device}", *settings]
    given = [word for setting in words for word in ("--set", setting)]
    runner.mpillm("train", "recipe.toml", "--resume", *given)
    same = tensors_of(last) == before and runner.losses(run) == first
    return "0" if same else "other bits", same


def tensors_of(checkpoint: Path) -> dict[str, list[str]]:
    """Return the hashes of a checkpoint's tensors."""
    index = json.loads((checkpoint / "index.json").read_text())
    return {
        name: [piece["xxh3_128"] for piece in entry["pieces"]]
        for name, entry in index["tensors"].items()
    }


def evaluated(runner: Runner, run: str) -> tuple[str, bool]:
    """Evaluate a run of the GPU there and on the CPU."""
    found = []
    for device in (runner.device, "cpu"):
        printed = runner.mpillm("evaluate", run, "--json", "--device", device)
        found.append(json.loads(printed)["model"]["loss"])
    difference = abs(found[0] / found[1] - 1)
    return f"{difference:.1e}", difference < 1e-5


def write_documents(folder: Path) -> None:
    """Write made-up sentences, the same in every run."""
    chance = random.Random(7)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(300)]
    folder.mkdir()
    for number in range(40):
        sentences = (" ".join(chance.choices(words, k=8)) + ".\n" for _ in range(100))
        (folder / f"{number:03d}.txt").write_text("".join(sentences))


def jobs_of(
    runner: Runner, options: argparse.Namespace, expected: Sequence[float]
) -> dict[str, Job | str]:
    """Return by name what to run; or, in words, why it is left out."""
    jobs: dict[str, Job | str] = {}
    for case in CASES:
        if options.quick and not case.quick:
            continue
        if case.ranks > 1 and not runner.launcher:
            jobs[case.name] = "no mpirun and no mpiexec"
        elif case.needs_cupy and options.no_cupy:
            jobs[case.name] = "no CuPy, through which ranks send"
        else:
            jobs[case.name] = functools.partial(compared, runner, case, expected)
    for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        jobs[f"resumed, {dtype}, fixed order"] = functools.partial(resumed, runner, dtype)
    return jobs


def row_of(name: str, job: Job | str) -> dict[str, str]:
    """Do a job; return its row: what was found, and `ok`, `wrong` or why there is nothing."""
    found = ""
    try:
        if isinstance(job, str):
            verdict = f"left out: {job}"
        else:
            found, well = job()
            verdict = "ok" if well else "wrong"
    except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as failure:
        lines = str(failure).splitlines() or [type(failure).__name__]
        print(f"{name}:\n" + "\n".join(f"    {line}" for line in lines), flush=True)
        verdict = f"failed: {lines[-1]}"
    print(f"{name:34} {found:10} {verdict}", flush=True)
    return {"case": name, "found": found, "verdict": verdict}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--launcher", default="", help="starts ranks; empty: 1 rank alone")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--no-cupy", action="store_true", help="leave out what needs CuPy")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []

    def add(row: dict[str, str]) -> None:
        rows.append(row)
        if options.out:
            # At once: the step may be ended by its limit.
            options.out.write_text(json.dumps({"steps": STEPS, "rows": rows}))

    with tempfile.TemporaryDirectory(prefix="mpillm-losses-") as folder:
        runner = Runner(Path(folder), options.device, options.launcher.split())
        (runner.folder / "recipe.toml").write_text(RECIPE)
        write_documents(runner.folder / "texts")
        runner.mpillm("prepare", "texts", "--out", "data", "--tokenizer", "bytes")
        expected = runner.train("cpu", "cpu")
        print(f"the CPU's losses: {expected[0]:.4f} … {expected[-1]:.4f}", flush=True)
        jobs = jobs_of(runner, options, expected)
        # On few cores one after the other, or runs outlast their limits.
        with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 4))) as pool:
            for row in pool.map(row_of, jobs, jobs.values()):
                add(row)
        saved = functools.partial(evaluated, runner, CASES[0].folder)
        add(row_of("saved on the GPU, evaluated on the CPU", saved))
    return any(row["verdict"].startswith(("failed", "wrong")) for row in rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failure:
        sys.exit(str(failure))
