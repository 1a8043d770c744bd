"""Compare 50 losses of every kind of model in every layout with those of one rank.

    python benchmarks/families.py [--ranks 1,2,3,4 --steps 50 --kinds masked-lm,ctc --json FILE]

The kinds are those of tests/train/test_task_runs.py: each task, by Transformers of each stack, a
mixture of experts and classic classifiers. Each number of ranks trains them by data, as a pipeline
and, where it is even, by both; then all again in a fixed order, whose losses have the same bits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The project's bar: relative difference of any loss.
LARGEST = 1e-5
MPIRUN = ["mpirun", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]


def layouts(ranks: int, blocks: int) -> dict[str, dict[str, object]]:
    """Return the layouts of a model of `blocks` blocks on `ranks` ranks, by name."""
    found: dict[str, dict[str, object]] = {"data": {"data": ranks}}
    if 1 < ranks <= blocks:
        found["pipeline"] = {"pipeline": ranks}
        if 2 * ranks <= blocks:
            found["pipeline, zb-v"] = {"pipeline": ranks, "schedule": "zb-v"}
    if ranks == 4:
        found["data × pipeline"] = {"data": 2, "pipeline": 2}
    return found


def child(folder: Path, kinds: list[str], steps: int) -> None:
    """Train in each layout of this number of ranks; rank 0 writes the losses."""
    from mpi4py import MPI

    from mpillm.system.console import Console
    from mpillm.train.recipe import parse_recipe
    from mpillm.train.setup import train
    from tests.train.test_task_runs import CASES, TASKS, recorded

    comm, quiet, found = MPI.COMM_WORLD, Console(speaks=False), {}
    for kind in kinds:
        task = kind.partition(" of ")[0]
        # Four blocks at least: a pipeline of 4 ranks.
        model = {**CASES[kind], "layers": max(4, CASES[kind]["layers"])}
        blocks = model["layers"] * (1 + (model.get("architecture") == "encoder-decoder"))
        for fixed in (False, True):
            for name, parallel in layouts(comm.size, blocks).items():
                # In a fixed order each rank's microbatches are a power of two.
                if fixed and name == "data" and comm.size == 3:
                    continue
                run = folder / f"run-{comm.size}-{len(found)}"
                table: dict[str, Any] = {
                    "model": model,
                    "task": {"name": TASKS.get(task, task)},
                    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
                    "data": {"path": str(folder / task)},
                    "train": {
                        "run": str(run),
                        "steps": steps,
                        "batch": 8 if fixed else 12,
                        "microbatch": 1,
                        "fixed_order": fixed,
                        "save_every": 0,
                    },
                    "parallel": parallel,
                }
                train(parse_recipe(table, kind), comm, quiet)
                if comm.rank == 0:
                    found[f"{kind}|{fixed}|{name}"] = recorded(run)["loss"]
                comm.Barrier()
    if comm.rank == 0:
        (folder / f"losses-{comm.size}.json").write_text(json.dumps(found))


def prepare(folder: Path, records: Path, kinds: list[str]) -> None:
    """Prepare the dataset of each task, of the records or of the checkout's documents."""
    from tests.train.test_task_runs import PAIR_KINDS

    mpillm = [sys.executable, "-m", "mpillm", "prepare"]
    for task in dict.fromkeys(kind.partition(" of ")[0] for kind in kinds):
        source = [str(records), "--task", task] if task in PAIR_KINDS else [str(ROOT / "docs")]
        options = ["--out", str(folder / task), "--tokenizer", "bytes", "--validation", "0.1"]
        subprocess.run([*mpillm, *source, *options], check=True, capture_output=True)


def run(folder: Path, ranks: int, given: argparse.Namespace) -> dict[str, list[float]]:
    """Train all kinds on `ranks` ranks; return their losses by kind, order and layout."""
    print(f"{ranks} ranks", flush=True)
    words = ["--child", str(folder), "--steps", str(given.steps), "--kinds", given.kinds]
    subprocess.run(
        [*MPIRUN, "-n", str(ranks), sys.executable, __file__, *words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, list[float]] = json.loads((folder / f"losses-{ranks}.json").read_text())
    return found


def compare(found: dict[str, dict[str, list[float]]]) -> dict[tuple[str, str], float]:
    """Return the largest relative difference from one rank, by kind and layout."""
    alone = found["1"]
    differences = {}
    for ranks, by_layout in found.items():
        for key, losses in by_layout.items():
            kind, fixed, layout = key.split("|")
            wanted = alone[f"{kind}|{fixed}|data"]
            assert len(losses) == len(wanted)
            order = ", fixed order" if fixed == "True" else ""
            differences[kind, f"{ranks} ranks, {layout}{order}"] = max(
                abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)
            )
    return differences


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.train.test_task_runs import CASES, write_records

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kinds", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    if given.child:
        child(given.child, kinds, given.steps)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder, write_records(folder / "records"), kinds)
        found = {ranks: run(folder, int(ranks), given) for ranks in given.ranks.split(",")}
    differences = compare(found)
    for kind in kinds:
        rows = {where: d for (of, where), d in differences.items() if of == kind}
        print(f"{kind:<42} {max(rows.values()):.1e} in {len(rows)} layouts")
    if given.json:
        named = {f"{kind}, {where}": d for (kind, where), d in differences.items()}
        given.json.write_text(json.dumps(named) + "\n")
    worst = max(differences, key=differences.__getitem__)
    print(f"largest: {differences[worst]:.1e} ({', '.join(worst)}), the bar is {LARGEST:g}")
    wrong = [
        key for key, d in differences.items() if d > (0 if "fixed order" in key[1] else LARGEST)
    ]
    if wrong:
        sys.exit(f"{len(wrong)} layouts differ: {wrong}")


if __name__ == "__main__":
    main()
