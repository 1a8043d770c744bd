"""Compare the peak memory that a plan predicts with the one that its run measures.

    python benchmarks/memory.py [--settings tiny,small] [--json FILE]
    python benchmarks/memory.py --layouts

Each setting is a run of `mpirun … mpillm train` on a small dataset, prepared once. Its history
holds both numbers: of the largest rank, from the start to the end of the last evaluation.

`--layouts` compares `train --dry-run --json` with runs of eight layouts. Of each rank: the peak of
its resident set (VmHWM at its end), shared pages included. Of the host: its ranks' proportional set
sizes (PSS), of each the largest of samples while it trains, together; samples miss short peaks, so
that is a lower bound. The dry run assumes what a process takes ahead of its model, which is no
formula of a layout: from both sides that is taken off. The dry run's is PROCESS_BYTES, on a host
less the code that its processes share; a run's is the resident set, or the PSS, of each rank when
its trainer is to be built. So a ratio is that of the model's own bytes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mpillm.machine.cpu import processor
from mpillm.plan.peak_memory import CODE_BYTES, PROCESS_BYTES
from mpillm.runs.history import attempts, read_history
from mpillm.system.console import binary_bytes

MPIRUN = ["mpirun", "--map-by", ":OVERSUBSCRIBE"]
# The project's bar.
LARGEST_ERROR = 0.1
# Layout → ranks and settings of [parallel]. 30 M weights and more: a model that the process does
# not hide.
LAYOUTS: dict[str, tuple[int, dict[str, str]]] = {
    "replicated": (2, {}),
    "zero = 1": (2, {"parallel.zero": "1"}),
    "zero = 2": (2, {"parallel.zero": "2"}),
    "zero = 3": (2, {"parallel.zero": "3"}),
    "pipeline = 2": (2, {"parallel.pipeline": "2"}),
    "tensor = 2": (2, {"parallel.tensor": "2"}),
    "context = 2": (2, {"parallel.context": "2"}),
    "experts = 2": (2, {"parallel.experts": "2", "model.experts": "4"}),
}
LAYOUT_MODEL = {
    "model.layers": "8",
    "model.width": "512",
    "model.heads": "8",
    "model.context": "256",
    "train.batch": "4",
    "train.steps": "2",
    "train.device": "cpu",
}
# Trains as `mpillm train` does, and prints the bytes of each rank before its model and at its end.
PROBE = """
import json, sys, threading
from pathlib import Path
from mpi4py import MPI
from mpillm.machine.memory import peak_resident_bytes, resident_bytes
from mpillm.system.console import Console
from mpillm.train import setup
from mpillm.train.recipe import load_recipe

comm, before, ended, most = MPI.COMM_WORLD, [], threading.Event(), [0]


def pss():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


class Watched(setup.Trainer):
    def __init__(self, *arguments):
        before.extend((resident_bytes(), pss()))
        threading.Thread(target=watch, daemon=True).start()
        super().__init__(*arguments)


def watch():
    while not ended.wait(0.1):
        most[0] = max(most[0], pss())


setup.Trainer = Watched
setup.train(load_recipe(Path(sys.argv[1]), sys.argv[2:], lambda text: None), comm, Console(False))
ended.set()
found = comm.gather((peak_resident_bytes(), before[0], most[0], before[1]))
if comm.rank == 0:
    print(json.dumps(found))
"""
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


def mpillm(ranks: int, *arguments: str | Path) -> str:
    """Run `mpillm` on `ranks` ranks; return what it prints, and show that where it fails."""
    return python(ranks, "-m", "mpillm", *arguments)


def python(ranks: int, *arguments: str | Path) -> str:
    """Run Python on `ranks` ranks; return what it prints, and show that where it fails."""
    command = [*MPIRUN, "-n", str(ranks), sys.executable, *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(folder: Path) -> Path:
    """Prepare a dataset of mpillm's own sources, of 512 tokens and more, with enough of them for
    validation that whole batches wait between stages.
    """
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


def measure_layout(name: str, data: Path, folder: Path) -> dict:
    """Train in one layout; return what its dry run predicts and what its ranks measure, of the
    rank and the host that need most, without what a process takes ahead of its model.
    """
    ranks, settings = LAYOUTS[name]
    recipe, run = folder / "recipe.toml", folder / "layout"
    recipe.write_text(f'[data]\npath = "{data}"\n[optimizer]\nwarmup_steps = 1\n')
    given = [f"{key}={value}" for key, value in {**LAYOUT_MODEL, **settings}.items()]
    given.append(f"train.run={run}")
    words = [word for text in given for word in ("--set", text)]
    words += ["--dry-run", "--json", "--ranks-per-node", str(ranks)]
    dry = json.loads(mpillm(1, "train", recipe, *words))
    found = json.loads(python(ranks, "-c", PROBE, recipe, *given).splitlines()[-1])
    shutil.rmtree(run)
    process = PROCESS_BYTES
    predicted = [rank["total_bytes"] - process for rank in dry["ranks"]]
    (host,) = dry["hosts"]
    shared = CODE_BYTES * (ranks - 1)
    return {
        "setting": name,
        "ranks": ranks,
        "predicted_bytes": max(predicted),
        "measured_bytes": max(peak - before for peak, before, _, _ in found),
        "host_predicted_bytes": host["total_bytes"] - ranks * process + shared,
        "host_measured_bytes": sum(most - before for _, _, most, before in found),
    }


def show_layout(row: dict) -> None:
    cells = []
    for whose in ("", "host_"):
        predicted, measured = row[f"{whose}predicted_bytes"], row[f"{whose}measured_bytes"]
        ratio = predicted / measured
        reached = "reached" if abs(ratio - 1) <= LARGEST_ERROR else "MISSED"
        cells.append(
            f"{binary_bytes(predicted):>11} {binary_bytes(measured):>11} {ratio:6.2f} {reached:7}"
        )
    print(f"{row['setting']:14} {row['ranks']:5} {'  '.join(cells)}", flush=True)


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
    parser.add_argument("--layouts", action="store_true", help="compare eight layouts")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    words = [word for word in options.settings.split(",") if word]
    every = LAYOUTS if options.layouts else SETTINGS
    chosen = [name for name in every if not words or any(word in name for word in words)]
    print(f"processor: {processor()[0]}")
    columns = f"{'predicted':>11} {'measured':>11} {'ratio':>6} 10%"
    if options.layouts:
        print(f"{'a rank and its host':20} {columns}      {columns}")
    else:
        print(f"{'setting':36} {'ranks':>5} {columns}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        data = prepare(Path(temporary))
        for name in chosen:
            take, tell = (measure_layout, show_layout) if options.layouts else (measure, show)
            rows.append(take(name, data, Path(temporary)))
            tell(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
