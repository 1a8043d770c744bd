"""Compare the peak memory that a plan predicts with the one that its run measures.

    python benchmarks/memory.py [--settings tiny,small] [--json FILE]

Each setting is a run of `mpirun … mpillm train` on a small dataset, prepared once. Its history
holds both numbers: of the largest rank, from the start to the end of the last evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mpillm.machine.cpu import processor
from mpillm.runs.history import attempts, read_history
from mpillm.system.console import binary_bytes

MPIRUN = ["mpirun", "--map-by", ":OVERSUBSCRIBE"]
# The project's bar.
LARGEST_ERROR = 0.1
# Name → ranks and settings. A few steps each: the peak is reached within three.
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "tiny, 1 rank": (1, {"model.shape": "tiny", "train.batch": "16"}),
    "small, 2 data ranks, microbatches": (
        2,
        {"model.shape": "small", "train.batch": "16", "train.microbatch": "2"},
    ),
    "small, pipeline of 2, 1f1b": (
        2,
        {
            "model.shape": "small",
            "train.batch": "16",
            "train.microbatch": "1",
            "parallel.pipeline": "2",
        },
    ),
    "medium, recompute full": (
        1,
        {
            "model.shape": "medium",
            "train.batch": "4",
            "train.microbatch": "2",
            "train.recompute": "full",
            "train.steps": "2",
        },
    ),
    "tiny, bfloat16, Muon": (
        1,
        {
            "model.shape": "tiny",
            "train.batch": "8",
            "train.dtype": "bfloat16",
            "optimizer.name": "muon",
        },
    ),
}


def mpillm(ranks: int, *arguments: str | Path) -> None:
    """Run `mpillm` on `ranks` ranks; show its output where it fails."""
    command = [*MPIRUN, "-n", str(ranks), sys.executable, "-m", "mpillm", *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def prepare(folder: Path) -> Path:
    """Prepare a dataset of mpillm's own sources, of 512 tokens and more."""
    sources = sorted(Path(__file__).parents[1].glob("mpillm/**/*.py"))
    text = folder / "sources.txt"
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sources))
    options = ("--vocab-size", "2048", "--validation", "0.02")
    mpillm(1, "prepare", text, "--out", folder / "data", *options)
    return folder / "data"


def measure(name: str, data: Path, folder: Path) -> dict:
    """Train with one setting; return what was predicted and measured."""
    ranks, settings = SETTINGS[name]
    recipe, run = folder / "recipe.toml", folder / name.replace(" ", "-").replace(",", "")
    shape = settings["model.shape"]
    recipe.write_text(
        f'[data]\npath = "{data}"\n[model]\nshape = "{shape}"\n[train]\nrun = "{run}"\nsteps = 4\n'
        "[optimizer]\nwarmup_steps = 1\n"
    )
    given = [f"{key}={value}" for key, value in settings.items() if key != "model.shape"]
    mpillm(ranks, "train", recipe, *(word for text in given for word in ("--set", text)))
    (attempt,) = attempts(read_history(run / "history.jsonl"))
    predicted, measured = attempt.predicted_memory_bytes, attempt.memory_bytes
    assert predicted, f"{run} has no prediction in its history"
    assert measured, f"{run} has no peak in its history"
    return {
        "setting": name,
        "ranks": ranks,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": predicted / measured,
    }


def show(row: dict) -> None:
    predicted, measured = (binary_bytes(row[f"{key}_bytes"]) for key in ("predicted", "measured"))
    within = abs(row["ratio"] - 1) <= LARGEST_ERROR
    print(
        f"{row['setting']:36} {row['ranks']:5} {predicted:>11} {measured:>11} {row['ratio']:6.2f} "
        f"{'reached' if within else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", default="", help="words of the settings to run, with commas; empty: all"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    words = [word for word in options.settings.split(",") if word]
    chosen = [name for name in SETTINGS if not words or any(word in name for word in words)]
    print(f"processor: {processor()[0]}")
    print(f"{'setting':36} {'ranks':>5} {'predicted':>11} {'measured':>11} {'ratio':>6} 10%")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        data = prepare(Path(temporary))
        for name in chosen:
            rows.append(measure(name, data, Path(temporary)))
            show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
