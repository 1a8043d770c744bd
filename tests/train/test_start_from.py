"""`train.start_from`: training begins with the weights and the settings of another model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, MismatchError
from mpillm.infer.loading import load_trained
from mpillm.models.part_module import create
from mpillm.system.console import Console
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import Recipe, load_recipe
from mpillm.train.setup import train
from tests.published import SPEC

pytest.importorskip("safetensors")
QUIET = Console(speaks=False)


def recipe(folder: Path, data: Path, start: Path, **sections: dict[str, Any]) -> Recipe:
    """Read a recipe of one step with a rate that moves nothing."""
    table: dict[str, dict[str, Any]] = {
        "data": {"path": str(data)},
        "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0, "warmup_steps": 0},
        "train": {"run": str(folder / "run"), "steps": 1, "batch": 12, "start_from": str(start)},
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


@pytest.mark.parametrize("layout", ["data", "pipeline"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_settings_are_those_of_the_model(
    data: Path, folder: Path, comm: MPI.Intracomm, published: Path, layout: str, dtype: str
) -> None:
    if layout == "pipeline" and comm.size > SPEC.layers:
        pytest.skip("more stages than layers")
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
    wide = {"architecture": "decoder", "layers": 2, "width": 64, "heads": 4}
    with pytest.raises(MismatchError, match=r"has the shape \[\d+, 32\], and the model's is"):
        train(recipe(folder, data, published, model=wide), comm, QUIET)
    deep = {"layers": 3}
    with pytest.raises(MismatchError, match=r"lacks \d+ weights of the model: layers\.2"):
        train(recipe(folder, data, published, model=deep), comm, QUIET)
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
