"""A small decoder that has learnt something, and its data: what the tests of compression read."""

from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
# Widths that groups of 32 divide and groups of 64 do not.
MODEL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 96, "context": 64}


def train_small(
    folder: Path, documents: Path, comm: MPI.Intracomm, steps: int = 40, **model: Any
) -> Path:
    """Train a decoder on the documents; return its run, next to the folder data/."""
    options = PrepareOptions((str(documents),), folder / "data", tokenizer="bytes", validation=0.1)
    prepare(options, comm, QUIET)
    table = {
        "model": {**MODEL, **model},
        "data": {"path": str(folder / "data")},
        "optimizer": {"learning_rate": 0.01},
        "train": {
            "run": str(folder / "run"),
            "sinks": [],
            "steps": steps,
            "batch": 12,
            "evaluate_every": 0,
        },
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    comm.Barrier()
    return folder / "run"
