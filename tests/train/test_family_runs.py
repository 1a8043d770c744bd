"""Every kind of model trains with the losses of one rank, whatever the layout.

benchmarks/families.py compares 50 losses of each.
"""

from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train
from tests.train.test_dropout_runs import losses

QUIET = Console(speaks=False)
SIZES = {"layers": 8, "width": 16, "heads": 2, "context": 24, "hidden": 24}
MASKED = {"name": "masked-lm"}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "mixture": {"model": {**SIZES, "experts": 4, "shared_hidden": 8}},
    "bert": {"model": {**SIZES, "architecture": "encoder"}, "task": MASKED},
    "modernbert": {
        "model": {
            **SIZES,
            "architecture": "encoder",
            "norm_place": "pre",
            "positions": "rotary",
            "activation": "geglu-exact",
            "window": 8,
            "full_every": 3,
        },
        "task": MASKED,
        "data": {"document_mask": True},
    },
}


def recipe(kind: str, dataset: Path, run: Path, /, **sections: dict[str, object]) -> Recipe:
    table: dict[str, dict[str, object]] = {
        "data": {"path": str(dataset)},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "schedule": "linear"},
        "train": {"run": str(run), "steps": 4, "batch": 12, "microbatch": 1},
    }
    for given in (KINDS[kind], sections):
        for name, section in given.items():
            table[name] = {**table.get(name, {}), **section}
    return parse_recipe(table, "test")


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_one_rank(
    kind: str, data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    alone = folder / "alone"
    if comm.rank == 0:
        train(recipe(kind, data, alone), MPI.COMM_SELF, QUIET)
    layouts: dict[str, dict[str, dict[str, object]]] = {
        "rows": {"train": {"microbatch": 2}},
        "stages": {"parallel": {"pipeline": comm.size}},
        "chunks": {"parallel": {"pipeline": comm.size, "schedule": "zb-v"}},
    }
    for name, sections in layouts.items():
        train(recipe(kind, data, folder / name, **sections), comm, QUIET)
    comm.Barrier()
    expected = losses(alone)
    assert len(expected) > 4
    for name in layouts:
        assert losses(folder / name) == pytest.approx(expected, rel=1e-5), name
