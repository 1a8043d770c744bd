"""Compare ranks with one on the requests of lm-evaluation-harness: log-likelihoods and texts.

    mpirun -n 2 python benchmarks/harness.py [--rounds 5 --json FILE]

A small decoder that was not trained scores continuations and rolling texts, and writes texts. Rank
0 alone, while the others sleep, and all ranks take turns, with one thread a rank. Results must have
the same bits. Ratios are taken within a round.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpillm.comm.waiting import patient_barrier
from mpillm.infer.harness.harness_model import HarnessModel, open_model_for_harness
from mpillm.infer.harness.task_file import TextSettings
from mpillm.infer.import_model import import_model
from mpillm.models.decoder import DecoderConfig
from mpillm.system.console import Console

# What the project asks of two ranks.
LEAST_SPEEDUP = 1.7
QUESTIONS, TEXTS, WRITTEN = 80, 16, 32
SPEC = DecoderConfig(
    layers=6, width=256, heads=8, kv_heads=4, context=512, vocab_size=8192, tied=False
)
QUIET = Console(speaks=False)


def make_model(folder: Path) -> Path:
    """Write the model with a tokenizer of bytes, as a checkpoint."""
    # The tests' writer of a small published model.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.published import publish

    publish(folder / "hub", SPEC)
    import_model(folder / "hub", folder / "model", MPI.COMM_SELF, QUIET)
    return folder / "model"


def words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices("etaoinshrdlu", k=5)) for _ in range(count))


def kinds_of_requests() -> dict[str, Callable[[HarnessModel], Any]]:
    """Make the requests: four continuations a question, texts to score, and texts to write."""
    chance = random.Random(1)
    pairs = []
    for _ in range(QUESTIONS):
        context = words(chance, chance.randint(8, 60))
        pairs += [(context, " " + words(chance, chance.randint(1, 4))) for _ in range(4)]
    texts = [words(chance, chance.randint(40, 240)) for _ in range(TEXTS)]
    contexts = [words(chance, chance.randint(8, 40)) for _ in range(WRITTEN)]
    return {
        "continuations": lambda model: model.likelihoods(pairs),
        "rolling texts": lambda model: model.rolling(texts),
        "written texts": lambda model: model.texts(contexts, TextSettings((), 48)),
    }


def timed(work: Callable[[HarnessModel], Any], model: HarnessModel) -> tuple[float, Any]:
    model.comm.Barrier()
    started = time.perf_counter()
    found = work(model)
    model.comm.Barrier()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path = comm.bcast(make_model(Path(name)) if comm.rank == 0 else None)
        together = open_model_for_harness(path, comm, QUIET, "cpu")
        alone = open_model_for_harness(path, MPI.COMM_SELF, QUIET, "cpu")
        comm.Barrier()
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds_of_requests()}
    # A first round warms up.
    for number in range(options.rounds + 1):
        for kind, work in kinds_of_requests().items():
            seconds, wanted = timed(work, alone) if comm.rank == 0 else (0.0, None)
            patient_barrier(comm)
            shared, found = timed(work, together)
            assert comm.rank or found == wanted, "ranks have other bits than one"
            if number:
                ratios[kind].append(seconds / shared)
    if comm.rank == 0:
        report(ratios, comm.size, options.json)


def report(ratios: dict[str, list[float]], ranks: int, out: Path | None) -> None:
    medians = {}
    for kind, each in ratios.items():
        found = sorted(each)
        low, high = found[len(found) // 4], found[-1 - len(found) // 4]
        medians[kind] = statistics.median(found)
        print(f"{kind:14} {ranks} ranks over one: {medians[kind]:.2f} [{low:.2f}..{high:.2f}]")
    if out:
        out.write_text(json.dumps({"medians": medians, "ratios": ratios}, indent=1) + "\n")
    if ranks == 2 and min(medians.values()) < LEAST_SPEEDUP:
        sys.exit(f"two ranks should be {LEAST_SPEEDUP} times as fast as one")


if __name__ == "__main__":
    main()
