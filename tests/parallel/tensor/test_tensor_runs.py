"""Runs whose layers are cut along the tensor axis, compared with runs on one rank."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
STEPS = 10
LLAMA = {"layers": 3, "width": 48, "heads": 12, "kv_heads": 4, "context": 24, "hidden": 100}
GPT2 = {
    "layers": 2,
    "width": 48,
    "heads": 12,
    "context": 24,
    "hidden": 90,
    "bias": True,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
}


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": LLAMA,
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "train": {"run": str(run), "steps": STEPS, "batch": 8},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def metrics(run: Path, *keys: str) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if set(keys) <= set(line)]


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_run_has_the_losses_of_one_rank(
    data: Path, folder: Path, comm: MPI.Intracomm, model: dict[str, object]
) -> None:
    if comm.rank == 0:
        train(recipe(data, folder / "alone", model=model), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    run = folder / "run"
    train(recipe(data, run, model=model, parallel={"tensor": comm.size}), comm, QUIET)
    for keys in (("loss", "grad_norm"), ("validation_loss",)):
        expected = metrics(folder / "alone", *keys)
        found = metrics(run, *keys)
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
