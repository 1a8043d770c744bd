from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpillm.errors import RecipeError
from mpillm.train.optimizers import torch_optimizer
from mpillm.train.optimizers.optimizer import OptimizerSettings
from mpillm.train.optimizers.optimizer_catalog import OPTIMIZERS, optimizer_class
from mpillm.weights.names import name_tensors, state_name, weight_name

WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::_to_copy", "aten::is_nonzero")


def some_weights() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in (("embedding.weight", (7, 4)), ("layers.0.up.weight", (4, 6)))
    }
    return {**weights, "layers.0.norm.weight": torch.nn.Parameter(torch.ones(4))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_entry_names_itself_and_builds_its_state(name: str) -> None:
    settings = optimizer_class(name)()
    assert isinstance(settings, OptimizerSettings)
    assert settings.name == name
    weights = some_weights()
    optimizer = settings.build(weights)
    tensors = name_tensors(weights, weights, optimizer.state, settings.slots)
    assert all(tensors.pop(weight_name(name)) is weight for name, weight in weights.items())
    shapes = {
        state_name(slot, name): shape
        for name, weight in weights.items()
        for slot, shape in settings.slot_shapes(name, tuple(weight.shape)).items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    if settings.elementwise:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes == settings.state_bytes_per_parameter * sum(
            weight.numel() for weight in weights.values()
        )
    # Every number of its state is saved, or is the number of steps.
    steps = {key for state in optimizer.state.values() for key in state} - set(settings.slots)
    assert steps <= {"step"}
    assert settings.describe()


class NoWaiting(TorchDispatchMode):
    """Refuse what waits for a GPU: a number of a tensor, and a copy to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.name() not in WAITING, f"{func.name()} waits for a GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    weights = some_weights()
    optimizer = optimizer_class(name)().build(weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    with NoWaiting():
        optimizer.step()
        with pytest.raises(AssertionError, match="waits for a GPU"):
            torch.ones(()).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_may_be_a_view_of_a_flat_array(name: str) -> None:
    """As float32 copies of half-precision weights are."""
    own, views = some_weights(), {}
    flat, first = torch.empty(sum(weight.numel() for weight in own.values())), 0
    for key, weight in own.items():
        view = flat[first : first + weight.numel()].view(weight.shape)
        views[key] = torch.nn.Parameter(view.copy_(weight.detach()))
        first += weight.numel()
    for weights in (own, views):
        optimizer = optimizer_class(name)().build(weights)
        for _ in range(2):
            for weight in weights.values():
                weight.grad = weight.detach() / 10
            optimizer.step()
    assert torch.equal(flat, torch.cat([weight.detach().flatten() for weight in own.values()]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_of_weights_has_the_bits_of_single_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU updates many weights at once."""
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(torch_optimizer, "_runs", lambda weights: [weights])
        weights = {**some_weights(), **{f"1.{n}": w for n, w in some_weights().items()}}
        optimizer = optimizer_class(name)().build(weights)
        for _ in range(2):
            for weight in weights.values():
                weight.grad = weight.detach() / 10
            optimizer.step()
        found.append(list(weights.values()))
    assert all(map(torch.equal, *found))


def test_a_run_on_a_gpu_is_bounded() -> None:
    def weight(elements: int) -> Any:
        return SimpleNamespace(is_cuda=True, numel=lambda: elements)

    large = torch_optimizer.RUN_ELEMENTS
    sizes = [3, large // 2, large // 2, 2 * large, 1, large - 1]
    runs = torch_optimizer._runs([weight(size) for size in sizes])
    assert [[each.numel() for each in run] for run in runs] == [
        [3, large // 2],
        [large // 2],
        [2 * large],
        [1, large - 1],
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_weight_stays(name: str) -> None:
    weights = some_weights()
    before = weights["embedding.weight"].detach().clone()
    optimizer = optimizer_class(name)().build(weights)
    weights["layers.0.norm.weight"].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(weights["embedding.weight"], before)
    assert not torch.equal(weights["layers.0.norm.weight"], torch.ones(4))


STEP_ALL = """
import sys, torch
from mpillm.train.optimizers.optimizer_catalog import OPTIMIZERS, optimizer_class
for name in OPTIMIZERS:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    vector = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class(name)().build({"layers.0.weight": weight, "norm": vector})
    weight.grad, vector.grad = torch.ones(3, 2), torch.ones(3)
    optimizer.step()
print([name for name in sys.modules if name.startswith("torch._dynamo")])
"""


def test_no_optimizer_imports_the_compiler(python: Callable[..., Any]) -> None:
    done = python("-c", STEP_ALL)
    assert done.stdout.strip() == "[]", done.stderr


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
