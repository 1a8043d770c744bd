"""Runs that learn from a teacher: in each layout, continued, and refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import MpillmError
from mpillm.infer.loading import load_trained
from mpillm.system.console import Console
from mpillm.tasks.task_catalog import make_task
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.dry_run import Hosts, print_dry_run
from mpillm.train.find_teacher import check_distils
from mpillm.train.recipe import Recipe, parse_recipe
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
        run(place, data, MPI.COMM_SELF, model=TEACHER, train={"steps": 12, "save_every": 6})
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


# Data-parallel ranks: tests/parallel/test_teacher.py.
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("logits", {"zero": 3}),
    ("logits", {"tensor": 2}),
    ("logits", {"pipeline": 2, "schedule": "zb-v"}),
    ("hidden", {"pipeline": 2, "schedule": "zb-h1"}),
    ("layers", {"zero": 3}),
]


@pytest.mark.parametrize(("way", "parallel"), LAYOUTS)
def test_the_losses_are_the_same_in_each_layout(
    way: str, parallel: dict[str, Any], folder: Path, data: Path, teacher: Path,
    alone: dict[str, Path], comm: MPI.Intracomm,
) -> None:  # fmt: skip
    if comm.size == 1 or (comm.size % 2 and "zero" not in parallel):
        pytest.skip("several ranks share the batch, two the layers and the heads")
    given = {"teacher": str(teacher), **WAYS[way]}
    small = {"microbatch": 1, "recompute": "full" if way == "layers" else "none"}
    run(folder / "run", data, comm, distillation=given, parallel=parallel, train=small)
    keys = ALL if way == "logits" else (*ALL, "distillation_hidden")
    found = torch.tensor(metrics(folder / "run", *keys))
    torch.testing.assert_close(
        found, torch.tensor(metrics(alone[way], *keys)), rtol=1e-5, atol=1e-6
    )


def test_a_resumed_run_has_the_same_losses_and_needs_the_same_teacher(
    folder: Path, data: Path, teacher: Path, comm: MPI.Intracomm
) -> None:
    given = {"teacher": str(teacher), **WAYS["hidden"]}
    whole, again = folder / "whole", folder / "again"
    run(whole, data, comm, distillation=given)
    run(again, data, comm, distillation=given, train={"steps": 2})
    run(again, data, comm, distillation=given, resume=True)
    comm.Barrier()
    assert metrics(again, *ALL, "distillation_hidden") == metrics(
        whole, *ALL, "distillation_hidden"
    )
    # Another distribution may be learnt from here on, other layers or another teacher not.
    for other, message in (
        ({**given, "hidden": "none"}, r"distillation\.layers was 'the last' and is 'none'"),
        ({**given, "teacher": str(teacher / "checkpoints/step-00000006")}, "is another model than"),
    ):
        with pytest.raises(MpillmError, match=message):
            run(again, data, comm, distillation=other, train={"steps": 4}, resume=True)


def test_a_student_is_a_model_without_its_projections(
    alone: dict[str, Path], folder: Path, data: Path, comm: MPI.Intracomm
) -> None:
    loaded = load_trained(alone["layers"], comm, QUIET)
    stored = loaded.checkpoint.tensors
    assert stored["projections/3/weight"].shape == (48, 32)
    assert loaded.checkpoint.facts["teacher"].keys() == {"path", "digest"}
    assert "projections" not in dict(loaded.model.named_modules())
    # Another run begins with it.
    run(folder / "next", data, comm, model={}, train={"start_from": str(alone["layers"])})
    comm.Barrier()
    assert metrics(folder / "next", "loss")[0] < metrics(alone["layers"], "task_loss")[0]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"distillation\.alpha = 1\.5: .*less than or equal to 1", {"alpha": 1.5}),
    (r"distillation\.temperature = 0\.0: .*greater than 0", {"temperature": 0.0}),
    ("alpha = 0 leaves the teacher's distribution out", {"alpha": 0.0}),
    ("layers names what is compared, and hidden = none", {"layers": [[0, 0]]}),
    (r"alpha belong to a teacher, and teacher names none", {"teacher": "", "alpha": 0.9}),
    (r"distillation\.teacher: gone does not exist; name a run", {"teacher": "gone"}),
    (r"layer 7 of the model, whose", {"hidden": "mse", "layers": [[7, 0]]}),
]


@pytest.mark.parametrize(("message", "given"), REFUSED)
def test_wrong_settings_are_refused(
    message: str, given: dict[str, Any], folder: Path, data: Path, teacher: Path,
    comm: MPI.Intracomm,
) -> None:  # fmt: skip
    with pytest.raises(MpillmError, match=message):
        run(folder / "run", data, comm, distillation={"teacher": str(teacher), **given})
    assert not (folder / "run").exists()


def test_what_does_not_fit_is_refused(
    folder: Path, data: Path, teacher: Path, documents: Path, comm: MPI.Intracomm
) -> None:
    given = {"teacher": str(teacher)}
    options = PrepareOptions((str(documents),), folder / "other", vocab_size=300, validation=0.1)
    prepare(options, comm, QUIET)
    with pytest.raises(MpillmError, match=r"distillation\.teacher: the data .* another tokenizer"):
        run(folder / "run", folder / "other", comm, distillation=given)
    with pytest.raises(MpillmError, match=r"reads context = 24 positions, and .* have 32; set"):
        run(folder / "run", data, comm, distillation=given, model={"context": 32})
    assert not (folder / "run").exists()


def test_a_task_without_logits_is_refused(data: Path, tmp_path: Path, teacher: Path) -> None:
    made = recipe_of(tmp_path, data, distillation={"teacher": str(teacher)})
    with pytest.raises(MpillmError, match="the loss of the task regression is no cross-entropy"):
        check_distils(made, make_task("regression"))
    hidden = recipe_of(tmp_path, data, distillation={"teacher": str(teacher), "hidden": "mse"})
    check_distils(hidden, make_task("causal-lm"))
    with pytest.raises(MpillmError, match="has one target a row; leave hidden out"):
        check_distils(hidden, make_task("sequence-classification"))


def test_a_dry_run_counts_the_teacher(
    data: Path, tmp_path: Path, teacher: Path, alone: dict[str, Path]
) -> None:
    plain, taught = (
        json.loads(dry_run(recipe_of(tmp_path, data, **sections)))
        for sections in ({}, {"distillation": {"teacher": str(teacher)}})
    )
    spec = load_trained(teacher, MPI.COMM_SELF, QUIET).model.spec
    for rank in taught["ranks"]:
        assert rank["bytes"]["teacher"] == 4 * spec.parameters
    assert plain["ranks"][0]["bytes"]["teacher"] == 0
    # The ranks of a host have one copy.
    more = taught["hosts"][0]["bytes"]["teacher"]
    assert more == pytest.approx(4 * spec.parameters, abs=4)
    halved = recipe_of(tmp_path, data, distillation={"teacher": str(teacher), "dtype": "bfloat16"})
    assert json.loads(dry_run(halved))["ranks"][0]["bytes"]["teacher"] == 2 * spec.parameters


def recipe_of(folder: Path, data: Path, **more: Any) -> Recipe:
    table = {
        "data": {"path": str(data)},
        "model": STUDENT,
        "train": {"run": str(folder / "run"), "batch": 12},
        **more,
    }
    return parse_recipe(table, "r")


def dry_run(made: Recipe) -> str:
    stream = io.StringIO()
    print_dry_run(made, Hosts.numbered(1, 3), Console(stream=stream), True)
    return stream.getvalue()
