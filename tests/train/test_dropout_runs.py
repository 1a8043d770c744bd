"""Runs with dropout: the masks are those of the samples, whatever the layout."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
DROPS = {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}


def recipe(dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "model": {"layers": 8, "width": 16, "heads": 2, "context": 24, **DROPS},
        "data": {"path": str(dataset), "document_mask": True},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "schedule": "linear"},
        "train": {"run": str(run), "sinks": [], "steps": 4, "batch": 12, "microbatch": 1},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [
        line["validation_loss"] for line in lines if "validation_loss" in line
    ]


def test_the_losses_are_those_of_one_rank(data: Path, folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        train(recipe(data, folder / "alone"), MPI.COMM_SELF, QUIET)
        train(recipe(data, folder / "none", model=dict.fromkeys(DROPS, 0.0)), MPI.COMM_SELF, QUIET)
    layouts: dict[str, dict[str, dict[str, object]]] = {
        "rows": {"train": {"microbatch": 3}},
        "stages": {"parallel": {"pipeline": comm.size}, "train": {"recompute": "full"}},
    }
    for name, sections in layouts.items():
        train(recipe(data, folder / name, **sections), comm, QUIET)
    expected = losses(folder / "alone")
    for name in layouts:
        assert losses(folder / name) == pytest.approx(expected, rel=1e-5), name
    assert losses(folder / "none") != pytest.approx(expected, rel=1e-3)


@pytest.mark.slow("trains whole runs, one for each layout")
def test_a_fixed_order_and_a_resumed_run_have_the_same_bits(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    fixed = {"fixed_order": True, "save_every": 2, "batch": 4 * comm.size}
    alone = folder / "alone"
    if comm.rank == 0:
        train(recipe(data, alone, train=fixed), MPI.COMM_SELF, QUIET)
    layouts: list[tuple[dict[str, object], object]] = [
        ({"data": comm.size}, "none"),
        ({"pipeline": comm.size, "schedule": "zb-v"}, "full"),
    ]
    for number, (parallel, recompute) in enumerate(layouts):
        run = folder / f"run{number}"
        sections = {"train": {**fixed, "recompute": recompute}, "parallel": parallel}
        train(recipe(data, run, **sections), comm, QUIET)
        assert losses(run) == losses(alone)
    comm.Barrier()
    if comm.rank == 0:
        (run / "checkpoints/step-00000004").rename(folder / "newer")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:3]))
    comm.Barrier()
    train(recipe(data, run, **sections), comm, QUIET, resume=True)
    assert losses(run) == losses(alone)
