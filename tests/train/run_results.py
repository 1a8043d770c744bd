"""What a run left, as tests compare it."""

import json
from pathlib import Path

import torch
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.weights.finding import find

NUMBERS = ("loss", "grad_norm", "validation_loss")


def metrics(run: Path, *keys: str) -> list[list[float]]:
    """Return these metrics of the lines that have all of them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if set(keys) <= set(line)]


def numbers(run: Path) -> list[list[float]]:
    """Return of each line its loss and norm, or its validation loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in NUMBERS if key in line] for line in lines]


def hashes(run: Path, comm: MPI.Intracomm) -> dict[str, list[str]]:
    """Return the hashes of the pieces of each tensor in the newest checkpoint."""
    tensors = find(run, comm, Console(speaks=False)).tensors
    return {name: [piece.xxh3_128 for piece in entry.pieces] for name, entry in tensors.items()}


def whole_tensors(run: Path, comm: MPI.Intracomm) -> dict[str, torch.Tensor]:
    """Read all tensors of the newest checkpoint, weights and states."""
    checkpoint = find(run, comm, Console(speaks=False))
    found = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in checkpoint.tensors.items()
    }
    checkpoint.load(found)
    return found
