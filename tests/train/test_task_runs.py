"""Each task trains a toy model end to end: the same losses in each layout, and after a resume."""

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.loading import load_data, load_trained, open_of
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import Recipe, parse_recipe
from mpillm.train.setup import train

QUIET = Console(speaks=False)
STEPS = 4
ENCODER = {"architecture": "tests.train.task_models:ToyEncoder"}
TRANSLATOR = {"architecture": "tests.train.task_models:ToyTranslator"}
CASES = {
    "masked-lm": ENCODER,
    "span-corruption": TRANSLATOR,
}


@pytest.fixture(scope="module")
def datasets(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> dict[str, Path]:
    """A small dataset for each task."""
    tokens = shared_folder / "task-tokens"
    prepare(PrepareOptions((str(documents),), tokens, "bytes", validation=0.1), comm, QUIET)
    return {"masked-lm": tokens, "span-corruption": tokens}


def recipe(task: str, data: Path, run: Path, steps: int = STEPS, **parallel: object) -> Recipe:
    table = {
        "model": CASES[task],
        "task": {"name": task},
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 1, "decay_share": 0.0},
        "data": {"path": str(data)},
        "train": {"run": str(run), "steps": steps, "batch": 12, "microbatch": 1},
        "parallel": parallel,
    }
    table["optimizer"]["schedule"] = "constant-then-decay"
    return parse_recipe(table, task)


def recorded(run: Path) -> dict[str, list[float]]:
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    keys = {key for line in lines for key in line if key == "loss" or "validation" in key}
    return {key: [line[key] for line in lines if key in line] for key in sorted(keys)}


@pytest.mark.parametrize("task", CASES)
def test_a_task_trains_alike_in_each_layout_and_after_a_resume(
    task: str, datasets: dict[str, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    data, alone = datasets[task], folder / "alone"
    if comm.rank == 0:
        train(recipe(task, data, alone), MPI.COMM_SELF, QUIET)
    comm.Barrier()
    expected = recorded(alone)
    assert len(expected["loss"]) == STEPS
    assert expected["loss"][-1] < expected["loss"][0]
    layouts = [{"pipeline": 1 + (comm.size % 2 == 0)}]
    for number, parallel in enumerate(layouts):
        run = folder / f"together-{number}"
        train(recipe(task, data, run, **parallel), comm, QUIET)
        found = recorded(run)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, rel=1e-5), (parallel, key)
    resumed = folder / "resumed"
    train(recipe(task, data, resumed, steps=2), comm, QUIET)
    train(recipe(task, data, resumed), comm, QUIET, resume=True)
    assert recorded(resumed)["loss"][-2:] == pytest.approx(expected["loss"][-2:], rel=1e-5)


@pytest.mark.parametrize("task", CASES)
def test_a_trained_model_is_scored_alike_at_any_number_of_ranks(
    task: str, datasets: dict[str, Path], folder: Path, comm: MPI.Intracomm
) -> None:
    train(recipe(task, datasets[task], folder / "run", steps=1), comm, QUIET)
    loaded = load_trained(folder / "run", comm, QUIET)
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        scores = [
            evaluate(WholeModel(loaded.model, loaded.task, each), reader, each, QUIET)
            for each in (comm, MPI.COMM_SELF)
        ]
    assert scores[0] == scores[1]
    assert recorded(folder / "run")["validation_loss"][-1] == pytest.approx(
        scores[0].loss, rel=1e-5
    )
