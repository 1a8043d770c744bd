"""`train.start_from`: training begins with the weights and the settings of another model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError
from mpillm.infer.evaluate import WholeModel, evaluate
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_data, load_trained, open_of
from mpillm.models.encoder import EncoderConfig
from mpillm.models.part_module import create
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import Recipe, load_recipe
from mpillm.train.setup import train
from tests.published import SPEC, publish

pytest.importorskip("safetensors")
QUIET = Console(speaks=False)


def recipe(folder: Path, data: Path, start: Path, **sections: dict[str, Any]) -> Recipe:
    """Read a recipe of one step with a rate that moves nothing."""
    table: dict[str, dict[str, Any]] = {
        "data": {"path": str(data)},
        "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0, "warmup_steps": 0},
        "train": {
            "run": str(folder / "run"),
            "sinks": [],
            "steps": 1,
            "batch": 12,
            "start_from": str(start),
        },
    }
    for name, keys in sections.items():
        table.setdefault(name, {}).update(keys)
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for name, keys in table.items()
    ]
    path = folder / f"recipe-{MPI.COMM_WORLD.rank}.toml"
    path.write_text("\n".join(lines))
    return load_recipe(path)


@pytest.mark.parametrize(
    "layout",
    ["data", pytest.param("pipeline", marks=pytest.mark.ranks(1, 2))],  # two layers
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_settings_are_those_of_the_model(
    data: Path, folder: Path, comm: MPI.Intracomm, published: Path, layout: str, dtype: str
) -> None:
    asked = recipe(
        folder,
        data,
        published,
        model={"context": 16},
        parallel={layout: comm.size},
        train={"dtype": dtype},
    )
    train(asked, comm, QUIET)
    comm.Barrier()
    loaded = load_trained(folder / "run", comm, QUIET)
    assert loaded.model.spec.resolved() == SPEC.replace(context=16).resolved()
    expected = dict(create(SPEC, 7).named_weights())
    for name, weight in loaded.model.named_weights():
        torch.testing.assert_close(
            weight.detach(), expected[name].detach().bfloat16().float(), rtol=0, atol=1e-7
        )
    # A run that was begun needs its source no more.
    if comm.rank == 0:
        (published / "config.json").unlink()
    comm.Barrier()
    again = load_recipe(folder / "run/recipe.toml", ["train.steps=2"])
    train(again, comm, QUIET, resume=True)
    assert load_trained(folder / "run", comm, QUIET).checkpoint.step == 2


def test_a_model_that_does_not_fit_is_refused(
    data: Path, folder: Path, comm: MPI.Intracomm, published: Path
) -> None:
    wide = {"architecture": "decoder", "layers": 2, "width": 64, "heads": 4, "tied": False}
    with pytest.raises(MismatchError, match=r"has the shape \[\d+, 32\], and the model's is"):
        train(recipe(folder, data, published, model=wide), comm, QUIET)
    deep = {"layers": 3}
    with pytest.raises(MismatchError, match=r"lacks \d+ weights of the model: layers\.2"):
        train(recipe(folder, data, published, model=deep), comm, QUIET)
    with pytest.raises(MismatchError, match=r"has \d+ weights that the model lacks: layers\.1"):
        train(recipe(folder, data, published, model={"layers": 1}), comm, QUIET)
    with pytest.raises(CheckpointError, match="is no model: it has neither"):
        recipe(folder, data, folder / "nowhere")


def test_another_tokenizer_is_refused(
    folder: Path, documents: Path, comm: MPI.Intracomm, published: Path
) -> None:
    options = PrepareOptions(
        (str(documents),), folder / "data", tokenizer="bpe", vocab_size=290, validation=0.1
    )
    prepare(options, comm, QUIET)
    with pytest.raises(MismatchError, match="was made with another tokenizer than"):
        train(recipe(folder, folder / "data", published), comm, QUIET)


BERT = EncoderConfig(
    layers=2, width=32, heads=4, hidden=48, context=16, vocab_size=300, token_types=2, dropout=0.1
)
CLASSIFICATION: dict[str, dict[str, Any]] = {
    "model": {"head": "sequence"},
    "task": {"name": "sequence-classification"},
}


def prepare_classes(folder: Path, comm: MPI.Intracomm, names: str = "abc", kind: str = "") -> Path:
    """Prepare texts or pictures of a class for each letter of `names`."""
    path, out = folder / f"{names}.jsonl", folder / f"data-{names}{kind}"
    if comm.rank == 0:
        rows = [
            {"text": names[n % len(names)] * 4 + "xyz"[n % 2], "image": [[n % len(names), 0]] * 2}
            | {"label": f"class {names[n % len(names)]}"}
            for n in range(96)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    comm.Barrier()
    task = kind or "sequence-classification"
    options = PrepareOptions((str(path),), out, tokenizer="bytes", validation=0.2, task=task)
    prepare(options, comm, QUIET)
    return out


def layout_of(comm: MPI.Intracomm) -> dict[str, int]:
    return {"pipeline": 1 + (comm.size % 2 == 0)}


def saved_weights(run: Path, comm: MPI.Intracomm) -> dict[str, torch.Tensor]:
    model = load_trained(run, comm, QUIET).model
    return {name: weight.detach() for name, weight in model.named_weights()}


@pytest.mark.parametrize("head", ["lm", "none"])
def test_an_imported_bert_learns_classes_by_a_new_head(
    folder: Path, comm: MPI.Intracomm, head: str
) -> None:
    layer = "norm" if head == "lm" else "tanh"
    if comm.rank == 0:
        publish(folder / "hub", BERT.replace(head=head, head_layer=layer))
    comm.Barrier()
    data, start = prepare_classes(folder, comm), folder / "imported"
    import_model(folder / "hub", start, comm, QUIET)
    said = io.StringIO()
    asked = recipe(folder, data, start, **CLASSIFICATION, parallel=layout_of(comm))
    train(asked, comm, Console(stream=said, speaks=comm.rank == 0))
    if comm.rank == 0:
        new = "head_dense.weight, head_dense.bias, head.weight, head.bias"
        assert f"new: {new} (initialised)" in said.getvalue()
    found = load_trained(folder / "run", comm, QUIET).model.spec
    # The head of a BERT with classes, which export writes.
    assert isinstance(found, EncoderConfig)
    assert (found.head_layer, found.classes, found.head_dropout) == ("tanh", 3, 0.1)
    source, fresh = saved_weights(start, comm), dict(create(found, 0).named_weights())
    for name, weight in saved_weights(folder / "run", comm).items():
        # `head_dense` is in both models.
        expected = fresh[name] if name.startswith("head") else source[name]
        torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-7)


def test_it_learns_alike_in_each_layout(folder: Path, comm: MPI.Intracomm) -> None:
    if comm.rank == 0:
        publish(folder / "hub", BERT)
    comm.Barrier()
    data, losses = prepare_classes(folder, comm), []
    rates = {"learning_rate": 0.01, "warmup_steps": 2}
    for run, each in (("alone", MPI.COMM_SELF), ("together", comm)):
        keys = {"run": str(folder / run), "steps": 20, "microbatch": 3}
        layout = layout_of(each)
        if run == "together" or comm.rank == 0:
            asked = recipe(
                folder, data, folder / "hub", **CLASSIFICATION,
                parallel=layout, optimizer=rates, train=keys,
            )  # fmt: skip
            train(asked, each, QUIET)
        comm.Barrier()
        lines = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    loaded = load_trained(folder / "together", comm, QUIET)
    with open_of(load_data(loaded.checkpoint, None), "validation") as reader:
        score = evaluate(WholeModel(loaded.model, loaded.task, comm), reader, comm, QUIET)
    assert score.values["accuracy"] == 1
    # Other names of as many classes: only their product is new.
    said, other = io.StringIO(), prepare_classes(folder, comm, "xyz")
    asked = recipe(folder, other, folder / "together", task=CLASSIFICATION["task"])
    train(asked, comm, Console(stream=said, speaks=comm.rank == 0))
    if comm.rank == 0:
        assert "new: head.weight, head.bias (initialised)" in said.getvalue()
        assert "head_dense" not in said.getvalue()


def test_a_shorter_context_takes_the_first_positions(folder: Path, comm: MPI.Intracomm) -> None:
    """Its losses are the same: rows are as short as the texts, and dropout does not depend on it.

    A pipeline's rows are as long as the context.
    """
    longer = BERT.replace(context=48, attention_dropout=0.1)
    if comm.rank == 0:
        publish(folder / "hub", longer)
    comm.Barrier()
    data, losses = prepare_classes(folder, comm), []
    for number, (context, layout) in enumerate([(48, {}), (16, {}), (48, layout_of(comm))]):
        run = folder / f"run{number}"
        asked = recipe(
            folder, data, folder / "hub", task=CLASSIFICATION["task"], parallel=layout,
            model={"head": "sequence", "context": context}, train={"run": str(run), "steps": 3},
        )  # fmt: skip
        train(asked, comm, QUIET)
        comm.Barrier()
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    short = saved_weights(folder / "run1", comm)["position.weight"]
    whole = saved_weights(folder / "run0", comm)["position.weight"]
    assert (len(short), len(whole)) == (16, 48)
    torch.testing.assert_close(short, whole[:16], rtol=0, atol=1e-4)


def test_a_vit_learns_other_classes(folder: Path, comm: MPI.Intracomm) -> None:
    spec = EncoderConfig(
        layers=2, width=32, heads=4, image_size=2, patch_size=1, channels=1, head="sequence",
        norm_place="pre", embedding_norm=False, head_layer="none", classes=7,
    )  # fmt: skip
    if comm.rank == 0:
        publish(folder / "hub", spec)
        (folder / "hub/tokenizer.json").unlink()
    comm.Barrier()
    kind = "image-classification"
    data, said = prepare_classes(folder, comm, kind=kind), io.StringIO()
    asked = recipe(folder, data, folder / "hub", task={"name": kind}, parallel=layout_of(comm))
    train(asked, comm, Console(stream=said, speaks=comm.rank == 0))
    assert saved_weights(folder / "run", comm)["head.weight"].shape == (3, 32)
    if comm.rank == 0:
        assert "new: head.weight, head.bias (initialised)" in said.getvalue()


def test_a_body_that_does_not_fit_is_refused_with_a_new_head(
    folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.rank == 0:
        publish(folder / "hub", BERT)
    comm.Barrier()
    data = prepare_classes(folder, comm)
    for layers, words in ((3, r"lacks \d+ weights of the model: layers\.2"), (1, "that the model")):
        keys = {"head": "sequence", "layers": layers}
        asked = recipe(folder, data, folder / "hub", task=CLASSIFICATION["task"], model=keys)
        with pytest.raises(MismatchError, match=words):
            train(asked, comm, QUIET)
