"""Runs that learn from a teacher: in each layout, continued, and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.system.console import Console
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.train.run_results import metrics

QUIET = Console(speaks=False)
TEACHER = {"layers": 3, "width": 48, "heads": 4, "context": 24}
STUDENT = {"layers": 4, "width": 32, "heads": 2, "context": 16}
ALL = ("loss", "task_loss", "distillation_kl", "grad_norm")


def run(folder: Path, data: Path, comm: MPI.Intracomm, resume: bool = False, **more: Any) -> None:
    table: dict[str, dict[str, Any]] = {
        "data": {"path": str(data)},
        "model": STUDENT,
        "optimizer": {"learning_rate": 0.005, "warmup_steps": 1},
        "train": {"run": str(folder), "steps": 3, "batch": 12, "sinks": []},
    }
    for name, keys in more.items():
        table[name] = {**table.get(name, {}), **keys}
    train(parse_recipe(table, "r"), comm, QUIET, resume=resume)


@pytest.fixture(scope="session")
def teacher(shared_folder: Path, data: Path, comm: MPI.Intracomm) -> Path:
    place = shared_folder / "teacher"
    if comm.rank == 0:
        run(place, data, MPI.COMM_SELF, model=TEACHER, train={"steps": 12})
    comm.Barrier()
    return place


WAYS: dict[str, dict[str, Any]] = {
    "logits": {"alpha": 0.7, "temperature": 2.0},
    "hidden": {"hidden": "mse", "hidden_weight": 0.5},
    "layers": {"hidden": "cosine", "layers": [[1, 0], [3, 2]], "top_k": 20},
}


@pytest.fixture(scope="session")
def alone(shared_folder: Path, data: Path, teacher: Path, comm: MPI.Intracomm) -> dict[str, Path]:
    """A run of each way on one rank."""
    places = {way: shared_folder / f"student-{way}" for way in WAYS}
    if comm.rank == 0:
        for way, place in places.items():
            given = {"teacher": str(teacher), **WAYS[way]}
            run(place, data, MPI.COMM_SELF, distillation=given)
    comm.Barrier()
    return places


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero": {"zero": 3},
    "pipeline": {"pipeline": 2, "schedule": "zb-h1"},
    "zb-v": {"pipeline": 2, "schedule": "zb-v"},
    "tensor": {"tensor": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_the_same_in_each_layout(
    way: str, layout: str, folder: Path, data: Path, teacher: Path, alone: dict[str, Path],
    comm: MPI.Intracomm,
) -> None:  # fmt: skip
    if comm.size == 1 or (layout in ("tensor", "pipeline", "zb-v") and comm.size % 2):
        pytest.skip("several ranks share the batch, two the layers and the heads")
    if (way != "logits" and layout == "tensor") or (
        way == "layers" and "pipeline" in LAYOUTS[layout]
    ):
        pytest.skip("the layout is refused")
    given = {"teacher": str(teacher), **WAYS[way]}
    small = {"microbatch": 1}
    run(folder / "run", data, comm, distillation=given, parallel=LAYOUTS[layout], train=small)
    keys = ALL if way == "logits" else (*ALL, "distillation_hidden")
    found = torch.tensor(metrics(folder / "run", *keys))
    torch.testing.assert_close(
        found, torch.tensor(metrics(alone[way], *keys)), rtol=1e-5, atol=1e-6
    )
