"""A run over a mesh of three axes: the third one repeats the work, and changes no number."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.parallel import axis_sizes
from mpillm.parallel.parallel_axis import ParallelAxis
from mpillm.system.console import Console
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)


class Copies(ParallelAxis):
    """An axis of `size` ranks that compute the same."""

    name = "copies"
    repeats_loss = True

    def __init__(self, size: int) -> None:
        self.size = size

    def wanted(self, settings):
        return self.size

    def shares(self, model, batch):
        return "nothing"

    def fault(self, size, model, batch):
        return ""

    def traffic_bytes(self, sizes, model, batch, chunks, element):
        return 0.0


def trained(run: Path, data: Path, comm: MPI.Intracomm, pipeline: int) -> list[list[float]]:
    """Train eight steps; return loss and gradient norm of each, and the validation loss."""
    table = {
        "model": {"layers": 2, "width": 16, "heads": 2, "context": 24},
        "data": {"path": str(data)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {
            "run": str(run),
            "sinks": [],
            "steps": 8,
            "batch": 12,
            "microbatch": 1,
            "fixed_order": True,
            "evaluate_every": 4,
        },
        "parallel": {"pipeline": pipeline},
    }
    # A power of two of microbatches a rank, which fixed_order needs.
    table["train"]["batch"] = 8
    train(parse_recipe(table, "three axes"), comm, QUIET)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = ("loss", "grad_norm", "validation_loss")
    return [[line[key] for key in kept if key in line] for line in lines]


@pytest.mark.parametrize("pipeline", [1, 2])
def test_an_axis_that_repeats_the_work_changes_no_bit(
    data: Path,
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: int,
) -> None:
    copies = 3 if comm.size == 3 else 2
    if comm.size % (pipeline * copies):
        pytest.skip("needs a rank for each coordinate")
    if comm.rank == 0:
        trained(folder / "alone", data, MPI.COMM_SELF, 1)
    comm.Barrier()
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES, Copies(copies)))
    found = trained(folder / "three", data, comm, pipeline)
    lines = map(json.loads, (folder / "alone" / "metrics.jsonl").read_text().splitlines())
    kept = ("loss", "grad_norm", "validation_loss")
    assert found == [[line[key] for key in kept if key in line] for line in lines]
    assert len(found) == 8 + 2
