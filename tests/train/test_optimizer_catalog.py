from pathlib import Path

import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.train.optimizers.optimizer import OptimizerSettings
from mpillm.train.optimizers.optimizer_catalog import OPTIMIZERS, optimizer_class
from mpillm.weights.names import name_tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_entry_names_itself_and_builds_its_state(name: str) -> None:
    settings = optimizer_class(name)()
    assert isinstance(settings, OptimizerSettings)
    assert settings.name == name
    weights = {"a": torch.nn.Parameter(torch.ones(3, 2)), "b": torch.nn.Parameter(torch.ones(4))}
    optimizer = settings.build(weights.values())
    tensors = name_tensors(weights, weights, optimizer.state, settings.slots)
    assert all(tensors.pop(f"model/{name}") is weight for name, weight in weights.items())
    slots = {(slot, name) for slot in settings.slots for name in weights}
    assert set(tensors) == {f"optimizer/{slot}/{name}" for slot, name in slots}
    assert all(tensor.shape == weights[name[-1]].shape for name, tensor in tensors.items())
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert nbytes == settings.state_bytes_per_parameter * 10
    assert settings.describe()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamv", r"optimizer.name: no optimizer is called 'adamv', did you mean adamw"),
        ("not_installed_here:Own", "cannot be imported"),
        ("pathlib:Path", "must name a class that derives from .*OptimizerSettings"),
        ("json:dumps", "must name a class that derives from .*OptimizerSettings"),
    ],
)
def test_a_wrong_optimizer_is_a_recipe_error(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        optimizer_class(name)


def test_a_plugin_is_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizers.py").write_text(
        "from mpillm.train.optimizers.adamw import AdamWSettings\n"
        "class Own(AdamWSettings):\n"
        "    slots = ('exp_avg',)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert optimizer_class("own_optimizers:Own").slots == ("exp_avg",)
