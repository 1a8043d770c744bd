"""Freeze weights of a part, and put adapters next to its linear layers."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mpillm.models.layers.adapted_linear import AdaptedLinear, Adapter
from mpillm.models.layers.quantized import StoredWeight
from mpillm.models.part_module import PartModule, WithoutValues
from mpillm.models.spec import ModelSpec, Part
from mpillm.models.tuning import INFIX, PROJECTIONS, AdapterSettings, Projection, Tuning

# The places of dropout masks in a layer: the others are those of `layers.dropout`.
FIRST_PLACE = 16


class FrozenWeight(NamedTuple):
    """A weight of the base that no step changes."""

    weight: nn.Parameter | None
    """None: it is stored in fewer bits."""
    stored: StoredWeight | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_of(self.stored).shape if self.weight is None else self.weight.shape)

    @property
    def tensors(self) -> list[Tensor]:
        """The memory that it takes, which `move` replaces."""
        return [self.weight] if self.weight is not None else list(_of(self.stored).tensors)

    def move(self, rooms: list[Tensor]) -> None:
        """Take `rooms` as its memory, one a tensor."""
        if self.weight is not None:
            self.weight.data = rooms[0]
        else:
            _of(self.stored).tensors[:] = rooms


def _of(stored: StoredWeight | None) -> StoredWeight:
    assert stored is not None
    return stored


def tune(part: PartModule, tuning: Tuning) -> None:
    """Freeze the weights that `tuning` does not train, and add its adapters and projections.

    The part has no values yet. Names of the base's weights stay; tied weights stay one.
    """
    if tuning.freezes:
        _freeze(part, tuning)
    own = part.part
    inside = [each for each in tuning.projections if own.first <= each.block < own.last]
    if inside:
        _project(part, inside)


def _project(part: PartModule, projections: Sequence[Projection]) -> None:
    made = nn.ModuleDict()
    for each in projections:
        with WithoutValues():
            made[str(each.block)] = nn.Linear(each.inputs, each.outputs, bias=False)
        # The size of an output's features stays.
        part.deviations[each.name] = each.inputs**-0.5
    part.add_module(PROJECTIONS.rstrip("."), made.to(next(part.parameters()).device))


def projection_of(part: PartModule, block: int) -> Tensor | None:
    """Return the weight that projects the output of a block of the part; None: there is none."""
    name = f"{PROJECTIONS}{block}.weight"
    return dict(part.named_parameters()).get(name)


def _freeze(part: PartModule, tuning: Tuning) -> None:
    for name, weight in part.named_weights():
        weight.requires_grad_(not tuning.is_frozen(name))
    if tuning.adapter.used:
        for name, linear in list(block_layers(part)):
            _adapt(part, name, linear, tuning.adapter)
        if tuning.adapter.dropout:
            for _, block in part.numbered_blocks():
                _pass_keys(block)


def block_layers(part: PartModule) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the part's blocks, by their names in the whole model."""
    blocks = {module for _, block in part.numbered_blocks() for module in block.modules()}
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear) and module in blocks:
            yield name, module


def _adapt(part: PartModule, name: str, linear: nn.Linear, settings: AdapterSettings) -> None:
    adapter = stored = None
    if settings.is_target(name):
        with WithoutValues():
            adapter = Adapter(linear, settings).to(linear.weight.device)
        # Kaiming's uniform distribution with a = √5 has this deviation. B begins with zeros, so
        # that the adapted model begins as the base.
        part.deviations[f"{name}{INFIX}a"] = (3 * linear.in_features) ** -0.5
        part.deviations[f"{name}{INFIX}b"] = 0.0
    if settings.base != "float32" and not linear.weight.requires_grad:
        with linear.weight.device:
            stored = StoredWeight((linear.out_features, linear.in_features), settings.base)
    if adapter is not None or stored is not None:
        parent, _, attribute = name.rpartition(".")
        setattr(part.get_submodule(parent), attribute, AdaptedLinear(linear, adapter, stored))


def _pass_keys(block: nn.Module) -> None:
    """Let the adapters of a block drop their inputs by the keys that the block is called with."""
    adapters = [module for module in block.modules() if isinstance(module, Adapter)]
    argument = list(inspect.signature(block.forward).parameters).index("keys_B")
    for number, adapter in enumerate(adapters):
        adapter.place = FIRST_PLACE + number

    def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
        for adapter in adapters:
            adapter.keys = given[argument] if len(given) > argument else None

    block.register_forward_pre_hook(enter)


def frozen_weights(part: PartModule) -> dict[str, FrozenWeight]:
    """Return the frozen weights of a part, by their names in the whole model."""
    found = {
        name: FrozenWeight(weight, None)
        for name, weight in part.named_weights()
        if not weight.requires_grad
    }
    for name, module in part.named_modules():
        if isinstance(module, AdaptedLinear) and module.stored is not None:
            found[f"{name}.weight"] = FrozenWeight(None, module.stored)
    return found


class TunedShapes(NamedTuple):
    """The weights of a whole model, by name: dtype (`float32`) and shape."""

    trained: Mapping[str, tuple[str, tuple[int, ...]]]
    frozen: Mapping[str, tuple[int, ...]]
    layers: tuple[str, ...]
    """The linear layers of its blocks."""


def tuned_shapes(spec: ModelSpec, tuning: Tuning) -> TunedShapes:
    """Return the weights of the whole model as `tuning` trains them.

    One block is built at a time, without values. Raises RecipeError for names that are none of the
    model's.
    """
    trained: dict[str, tuple[str, tuple[int, ...]]] = {}
    frozen: dict[str, tuple[int, ...]] = {}
    layers: list[str] = []
    own: list[str] = []
    for block in range(spec.blocks):
        with WithoutValues():
            part = spec.build(Part(block, block + 1))
            layers += [name for name, _ in block_layers(part)]
            own += [name for name, _ in part.named_weights()]
            tune(part, tuning)
        for name, weight in part.named_weights():
            if weight.requires_grad:
                trained[name] = (str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
        for name, held in frozen_weights(part).items():
            frozen[name] = held.shape
    if tuning.freezes:
        tuning.check_names(layers, list(dict.fromkeys(own)))
    return TunedShapes(trained, frozen, tuple(layers))
