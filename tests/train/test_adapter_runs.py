"""Runs of adapters: trained, evaluated, continued, exported, and refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, LayoutError, MismatchError, RecipeError
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.export_model import export_model
from mpillm.infer.generate import generate
from mpillm.infer.loading import load_data, load_trained, open_of
from mpillm.infer.model_source import open_model
from mpillm.infer.sampling import Sampling
from mpillm.models.part_module import create
from mpillm.runs.folder import METRICS
from mpillm.runs.metrics import read_metrics
from mpillm.system.console import Console
from mpillm.train.recipe import Recipe, load_recipe
from mpillm.train.setup import train
from mpillm.weights.open_source import open_source
from tests.published import SPEC, publish

save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file
QUIET = Console(speaks=False)
LORA = {"method": "lora", "rank": 2, "alpha": 8.0}


def recipe(run: Path, data: Path, start: Path | None, **sections: Mapping[str, Any]) -> Recipe:
    """Read a recipe of four steps that learn quickly."""
    table: dict[str, dict[str, Any]] = {
        "data": {"path": str(data)},
        "model": {"context": 16},
        "adapter": dict(LORA),
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 0},
        "train": {"run": str(run), "sinks": [], "steps": 4, "batch": 12, "save_every": 2},
    }
    if start is not None:
        table["train"]["start_from"] = str(start)
    for name, keys in sections.items():
        table.setdefault(name, {}).update(keys)
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for name, keys in table.items()
    ]
    path = run.parent / f"{run.name}-{MPI.COMM_WORLD.rank}.toml"
    path.write_text("\n".join(lines))
    return load_recipe(path)


def weights_of(run: Path, comm: MPI.Intracomm) -> dict[str, torch.Tensor]:
    """Read the adapters of a run, and what else is trained."""
    source = open_source(run, comm, QUIET)
    names = [name for name in source.tensors if name.startswith("model/")]
    return {name: source.read(name) for name in names}


@pytest.fixture(scope="session")
def base(shared_folder: Path, comm: MPI.Intracomm) -> Path:
    """A published model, which tests read."""
    if comm.rank == 0:
        publish(shared_folder / "adapter-base")
    comm.Barrier()
    return shared_folder / "adapter-base"


@pytest.fixture(scope="session")
def lora(shared_folder: Path, data: Path, base: Path, comm: MPI.Intracomm) -> Path:
    """A run of adapters on all ranks, by data."""
    run = shared_folder / "adapter-run"
    train(recipe(run, data, base), comm, QUIET)
    comm.Barrier()
    return run


def test_adapters_alone_are_trained_and_saved(lora: Path, base: Path, comm: MPI.Intracomm) -> None:
    found = weights_of(lora, comm)
    assert {name.rpartition("/")[2] for name in found} == {"a", "b"}
    assert len(found) == 2 * 7 * SPEC.layers
    assert all(value.abs().sum() > 0 for value in found.values())
    states = [name for name in open_source(lora, comm, QUIET).tensors if "optimizer" in name]
    assert len(states) == 2 * len(found)
    # The base is as it was; what is loaded is merged.
    expected, loaded = create(SPEC, 7), load_trained(lora, comm, QUIET)
    before = {name: weight.bfloat16().float() for name, weight in expected.named_weights()}
    now = dict(loaded.model.named_weights())
    assert torch.equal(now["embedding.weight"], before["embedding.weight"])
    changed = "layers.1.feed_forward.down"
    a_RI, b_OR = (found[f"model/{changed.replace('.', '/')}/adapter/{own}"] for own in "ab")
    merged = before[f"{changed}.weight"] + 4 * (b_OR @ a_RI)
    torch.testing.assert_close(now[f"{changed}.weight"], merged)


@pytest.mark.parametrize(
    "layout",
    [
        "zero",
        pytest.param("pipeline", marks=pytest.mark.ranks(2)),  # two layers
        pytest.param("tensor", marks=pytest.mark.ranks(2, 4)),  # four heads
    ],
)
def test_every_layout_learns_the_same(
    lora: Path, folder: Path, data: Path, base: Path, comm: MPI.Intracomm, layout: str
) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to share")
    sizes = {"zero": 3} if layout == "zero" else {layout: comm.size}
    train(recipe(folder / "run", data, base, parallel=sizes), comm, QUIET)
    comm.Barrier()
    expected = weights_of(lora, comm)
    found = weights_of(folder / "run", comm)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.ranks(2)  # four layers in two or four stages
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_a_tied_embedding_is_the_bases_in_each_stage(
    folder: Path, data: Path, comm: MPI.Intracomm, schedule: str
) -> None:
    """With zb-v the first rank has the embedding and the head."""
    if comm.rank == 0:
        publish(folder / "tied", replace(SPEC, tied=True, layers=4))
    comm.Barrier()
    for name, layout in (("data", {}), ("stages", {"pipeline": 2, "schedule": schedule})):
        train(recipe(folder / name, data, folder / "tied", parallel=layout), comm, QUIET)
        comm.Barrier()
    found, expected = (
        [line["loss"] for line in read_metrics(folder / name / METRICS) if "loss" in line]
        for name in ("stages", "data")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_continues_exactly(
    lora: Path, folder: Path, data: Path, base: Path, comm: MPI.Intracomm
) -> None:
    run = folder / "run"
    if comm.rank == 0:
        shutil.copytree(lora, run)
        shutil.rmtree(run / "checkpoints/step-00000004")
    comm.Barrier()
    again = recipe(run, data, base)
    with pytest.raises(MismatchError, match=r"adapter\.rank was 2 and is 3"):
        train(replace(again, adapter=replace(again.adapter, rank=3)), comm, QUIET, resume=True)
    train(again, comm, QUIET, resume=True)
    comm.Barrier()
    found, expected = (open_source(each, comm, QUIET) for each in (run, lora))
    assert found.facts["base"] == expected.facts["base"]
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    # The base is another model by now.
    if comm.rank == 0:
        shutil.copytree(base, folder / "other")
        weights = load_file(folder / "other/model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, folder / "other/model.safetensors", {"format": "pt"})
    comm.Barrier()
    other = recipe(run, data, folder / "other", train={"steps": 5})
    with pytest.raises(MismatchError, match="is another model than the base that the adapters"):
        train(other, comm, QUIET, resume=True)


def test_what_is_merged_computes_the_same(
    lora: Path, folder: Path, base: Path, comm: MPI.Intracomm
) -> None:
    loaded = load_trained(lora, comm, QUIET)
    # The run evaluates with its adapters next to the base.
    measured = [line for line in read_metrics(lora / METRICS) if "validation_loss" in line]
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        score = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
    assert score.loss == pytest.approx(measured[-1]["validation_loss"], abs=1e-5)
    assert list(generate(loaded.model, loaded.tokenizer, "the ", Sampling(3, 0.0)))
    export_model(lora, folder / "out", "hf", "float32", comm, QUIET)
    comm.Barrier()
    exported = open_model(open_source(folder / "out", comm, QUIET), comm, QUIET)
    for name, weight in loaded.model.named_weights():
        assert torch.equal(exported.read(name), weight.detach()), name


@pytest.mark.parametrize("settings", [{"base": "int4"}, {"method": "dora", "base": "bfloat16"}])
def test_other_bases_and_methods_learn_what_is_merged(
    folder: Path, data: Path, base: Path, comm: MPI.Intracomm, settings: dict[str, Any]
) -> None:
    run = folder / "run"
    # A mask of dropout is of training alone; a head's weights are trained whole.
    adapter = {"dropout": 0.2, "also": ["norm.*"], **settings}
    train(recipe(run, data, base, adapter=adapter, train={"steps": 2}), comm, QUIET)
    comm.Barrier()
    found = weights_of(run, comm)
    assert "model/norm/weight" in found
    assert ("model/layers/0/attention/query/adapter/magnitude" in found) == ("method" in settings)
    loaded = load_trained(run, comm, QUIET)
    measured = [line for line in read_metrics(run / METRICS) if "validation_loss" in line]
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        score = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
    assert score.loss == pytest.approx(measured[-1]["validation_loss"], abs=1e-5)


def test_frozen_layers_stay_and_are_saved(
    folder: Path, data: Path, base: Path, comm: MPI.Intracomm
) -> None:
    layout = {"pipeline": 2, "schedule": "zb-h1"} if comm.size == 2 else {}
    given = {"adapter": {"method": "none"}, "parallel": layout}
    train(recipe(folder / "run", data, base, train={"freeze": 1, "steps": 2}, **given), comm, QUIET)
    comm.Barrier()
    again = recipe(folder / "run", data, base, train={"freeze": 1, "steps": 3}, **given)
    other = replace(again, train=replace(again.train, freeze=0))
    with pytest.raises(MismatchError, match=r"train\.freeze was \['1'\] and is \[\]"):
        train(other, comm, QUIET, resume=True)
    train(again, comm, QUIET, resume=True)
    comm.Barrier()
    before = open_model(open_source(base, comm, QUIET), comm, QUIET)
    after = load_trained(folder / "run", comm, QUIET)
    for name, weight in after.model.named_weights():
        frozen = name.startswith(("embedding.", "layers.0."))
        assert torch.equal(weight.detach(), before.read(name).float()) == frozen, name
        state = f"optimizer/exp_avg/{name.replace('.', '/')}"
        assert (state in after.checkpoint.tensors) != frozen


def test_a_missing_base_is_named(lora: Path, folder: Path, base: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        base.rename(base.with_name("moved"))
    comm.Barrier()
    try:
        with pytest.raises(CheckpointError, match=rf"the base {base} of the adapters in"):
            load_trained(lora, comm, QUIET)
    finally:
        comm.Barrier()
        if comm.rank == 0:
            base.with_name("moved").rename(base)
        comm.Barrier()


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (
        RecipeError,
        r"adapter\.targets names 'queries', and the linear layers of the model are "
        "query, key, value, output, gate, up, down",
        {"adapter": {"targets": ["queries"]}},
    ),
    (
        RecipeError,
        "adapter.also names 'haed.*', which is no weight",
        {"adapter": {"also": ["haed.*"]}},
    ),
    (RecipeError, "leave train.freeze out", {"train": {"freeze": 1}}),
    (RecipeError, "compiles layers without adapters", {"train": {"compile": True}}),
    (
        RecipeError,
        "freezes all weights",
        {"adapter": {"method": "none"}, "train": {"freeze": ["*"]}},
    ),
    pytest.param(
        LayoutError,
        "needs whole rows of each weight",
        {"adapter": {"method": "dora"}, "parallel": {"tensor": 2}},
        marks=pytest.mark.ranks(2),
    ),
]


@pytest.mark.parametrize(("kind", "message", "sections"), REFUSED)
def test_what_cannot_be_is_refused(
    folder: Path,
    data: Path,
    base: Path,
    comm: MPI.Intracomm,
    kind: type[Exception],
    message: str,
    sections: dict[str, Any],
) -> None:
    with pytest.raises(kind, match=message):
        train(recipe(folder / "run", data, base, **sections), comm, QUIET)
    assert not (folder / "run").exists()


def test_an_adapter_needs_a_base_and_a_rank(
    folder: Path, data: Path, base: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.rank = 0: .*greater than or equal to 1"):
        recipe(folder / "run", data, base, adapter={"rank": 0})
    whole = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 300}
    with pytest.raises(RecipeError, match="name a run, a checkpoint or a Hugging Face folder"):
        train(recipe(folder / "run", data, None, model=whole), comm, QUIET)
