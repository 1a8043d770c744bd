"""Which weights a run trains: all, adapters next to frozen ones, or those of some layers.

Adapters: Hu et al. 2021, "LoRA", and Liu et al. 2024, "DoRA". The names of adapters' weights are
`NAME.adapter.a` (rank, inputs), `.b` (outputs, rank) and DoRA's `.magnitude` (outputs), where the
layer's own weight is `NAME.weight`. Imports no torch: a recipe holds these settings.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

from mpillm.errors import RecipeError
from mpillm.models.spec import ModelSpec, Part

BaseFormat = Literal["float32", "bfloat16", "int8", "int4"]
BASE_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.25}
"""Of a stored weight with its scales; float32 means the run's dtype."""
INFIX = ".adapter."
# Linear layers of a mixture that choose experts: an adapter would change the choice.
ROUTERS = ("router", "shared_factor")
# How the name of a weight of a layer begins.
_NUMBERED = re.compile(r"(?:layers|encoder)\.(\d+)\.")
# How the names of weights ahead of the first layer begin.
AHEAD = (
    "embedding",
    "source_embedding",
    "position",
    "token_type",
    "embedding_norm",
    "patches",
    "sound",
)


@dataclass(frozen=True)
class AdapterSettings:
    """The section [adapter]: low-rank adapters next to frozen weights of `train.start_from`."""

    method: Literal["none", "lora", "dora"] = "none"
    """none: all weights are trained. dora: learns the lengths of a weight's rows, too."""
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """The linear layers that get one: names such as query, or globs on whole names such as
    layers.1.*; empty: all those of the blocks, but routers.
    """
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the adapters' inputs, in training."""
    also: tuple[str, ...] = ()
    """Weights that are trained and saved whole, as globs on their names. Those of a head that the
    base lacks are added.
    """
    base: BaseFormat = "float32"
    """How the frozen linear layers of blocks are stored. float32: in train.dtype. int8: a scale a
    row. int4: a scale a group of 64. They are rounded to the nearest value.
    """

    @property
    def used(self) -> bool:
        return self.method != "none"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def trains_whole(self, name: str) -> bool:
        """Return whether the base's own weight `name` is trained next to the adapters."""
        return any(fnmatchcase(name, pattern) for pattern in self.also)

    def is_target(self, name: str) -> bool:
        """Return whether the linear layer `name` of a block gets an adapter."""
        last = name.rpartition(".")[2]
        if not self.targets:
            return last not in ROUTERS
        return any(last == target or fnmatchcase(name, target) for target in self.targets)


NO_ADAPTER = AdapterSettings()
PROJECTIONS = "projections."
"""How the names of weights begin that training needs and the model does not."""


class Projection(NamedTuple):
    """A trained product that takes the output of a block to another width."""

    block: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{PROJECTIONS}{self.block}.weight"


@dataclass(frozen=True)
class Tuning:
    """What of a model is trained."""

    adapter: AdapterSettings = NO_ADAPTER
    freeze: tuple[str, ...] = ()
    """Weights that stay as they are: a number of layers, or globs on names."""
    projections: tuple[Projection, ...] = ()
    """Trained next to the model, from outputs of its blocks."""

    @property
    def freezes(self) -> bool:
        """Whether any weight is frozen."""
        return self.adapter.used or bool(self.freeze)

    def is_frozen(self, name: str) -> bool:
        """Return whether the model's own weight `name` stays as it is."""
        if name.startswith(PROJECTIONS):
            return False
        if self.adapter.used:
            return not self.adapter.trains_whole(name)
        return any(_matches(pattern, name) for pattern in self.freeze)

    def check_names(self, layers: list[str], weights: list[str]) -> None:
        """Raise RecipeError for a pattern that means nothing, with the names that there are.

        `layers`: the linear layers of all blocks; `weights`: the model's own weights.
        """
        adapter = self.adapter
        if adapter.used and not layers:
            raise RecipeError(
                f"adapter.method = {adapter.method} needs linear layers in blocks, as Transformers "
                "have; leave [adapter] out, and freeze weights by train.freeze"
            )
        known = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
        for target in adapter.targets if adapter.used else ():
            if not any(AdapterSettings(targets=(target,)).is_target(layer) for layer in layers):
                raise RecipeError(
                    f"adapter.targets names {target!r}, and the linear layers of the model are "
                    f"{', '.join(known)}; name some of these, or globs such as {layers[0]}"
                )
        given = {"adapter.also": adapter.also} if adapter.used else {"train.freeze": self.freeze}
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in weights))
        for setting, patterns in given.items():
            for pattern in patterns:
                if not any(_matches(pattern, name) for name in weights):
                    raise RecipeError(
                        f"{setting} names {pattern!r}, which is no weight of the model; its "
                        f"weights are {', '.join(kinds)}"
                    )
        numbers = [int(found[1]) + 1 for found in map(_NUMBERED.match, weights) if found]
        if (first := first_layers(self.freeze)) > (count := max(numbers, default=0)):
            raise RecipeError(
                f"train.freeze = {first:,} is more layers than the model has ({count:,}); freeze "
                "fewer, or name weights"
            )
        if weights and all(map(self.is_frozen, weights)) and not adapter.used:
            raise RecipeError(
                f"train.freeze = {list(self.freeze)} freezes all weights of the model; leave one "
                "to be trained"
            )

    def trained_of(self, model: ModelSpec, part: Part) -> int:
        """Estimate the trained parameters of `part`, without torch.

        Matrices of a block are taken to have the stream's width along one dim.
        """
        whole = model.parameters_of(part)
        if not self.adapter.used:
            frozen = sum(
                model.parameters_of(Part(block, block + 1))
                for block in range(part.first, part.last)
                if 0 < block < model.blocks - 1 and block < first_layers(self.freeze)
            )
            return max(1, whole - min(whole, frozen))
        width = max(model.stream_widths)
        in_blocks = part.count * model.block_parameters_of(part)[1]
        # A query, a key, a value, an output, and three of a gated feed-forward.
        return min(whole, self.adapter.rank * (in_blocks // width + 7 * width * part.count))

    def share_of(self, model: ModelSpec) -> float:
        """Estimate the share of the model's parameters that is trained."""
        if not self.freezes:
            return 1.0
        return self.trained_of(model, model.whole) / max(1, model.parameters)


ALL_WEIGHTS = Tuning()


def first_layers(freeze: tuple[str, ...]) -> int:
    """Return how many of the first layers `train.freeze` names by their number."""
    return max((int(pattern) for pattern in freeze if pattern.isdecimal()), default=0)


def _matches(pattern: str, name: str) -> bool:
    """Return whether a glob, or a number of first layers, means the weight `name`.

    The first layers hold what is ahead of them: embeddings.
    """
    if not pattern.isdecimal():
        return fnmatchcase(name, pattern)
    found = _NUMBERED.match(name)
    if found:
        return int(found[1]) < int(pattern)
    return int(pattern) > 0 and name.split(".")[0] in AHEAD


def layer_of(name: str) -> str:
    """Return the linear layer that the adapter's weight `name` belongs to; "": it is none."""
    layer, infix, _ = name.rpartition(INFIX)
    return layer if infix else ""


def freeze_patterns(freeze: int | Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of `train.freeze`, which may be a number of first layers."""
    if isinstance(freeze, int):
        return (str(freeze),) if freeze else ()
    return tuple(freeze)


def read_tuning(recipe: Mapping[str, Any]) -> Tuning:
    """Read what a checkpoint's recipe trains."""
    train = recipe.get("train")
    freeze = train.get("freeze", ()) if isinstance(train, dict) else ()
    return Tuning(read_adapter(recipe.get("adapter")), freeze_patterns(freeze))


def read_adapter(section: Any) -> AdapterSettings:
    """Read the section [adapter] of a checkpoint's recipe, which earlier releases lack."""
    if not isinstance(section, dict):
        return NO_ADAPTER
    known = {
        name: section[name] for name in AdapterSettings.__dataclass_fields__ if name in section
    }
    lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return AdapterSettings(**{**known, **lists})
