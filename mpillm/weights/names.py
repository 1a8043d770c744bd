"""The names of a checkpoint: one namespace for every layout, without torch.

    model/layers/0/attention/query/weight              a weight
    optimizer/exp_avg/layers/0/attention/query/weight  the optimizer's slot `exp_avg` of that weight
    projections/3/weight                               a weight of training that no model has
    stored/layers/0/attention/query/weight/codes       a weight as whole numbers, with its scales

A name never mentions a rank, a stage or a shard: a layout is only a way to cut the whole tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mpillm.models.tuning import PROJECTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from mpillm.weights.slices import Held


STORED = "stored/"


def name_tensors(
    weights: Mapping[str, "Tensor"],
    stepped: Mapping[str, "Tensor"],
    state: Mapping["Tensor", Mapping[str, Any]],
    slots: Iterable[str],
    held: "Callable[[str, Tensor], Held]" = lambda name, tensor: tensor,
) -> dict[str, "Held"]:
    """Name weights, and the state tensors of an optimizer, as a checkpoint does.

    `weights`: by the module's names (`layers.0.norm.weight`). `stepped`: what the optimizer steps
    on, by the same names. `state`: as `torch.optim.Optimizer.state`, of which `slots` are named,
    each where a weight has it. `held(name, tensor)`: what a tensor of a weight is of the whole one.
    """
    named = {weight_name(name): held(name, weight) for name, weight in weights.items()}
    for slot in slots:
        for name, weight in stepped.items():
            if slot in state[weight]:
                named[state_name(slot, name)] = held(name, state[weight][slot])
    return named


def weight_name(name: str) -> str:
    """Name a weight of the module (`layers.0.norm.weight`) as a checkpoint does."""
    place = name.replace(".", "/")
    return place if name.startswith(PROJECTIONS) else f"model/{place}"


def module_names(names: Iterable[str]) -> dict[str, str]:
    """Map the weights among the names of a checkpoint: the module's name → the checkpoint's."""
    prefix = weight_name("")
    weights = (name for name in names if name.startswith(prefix))
    return {name.removeprefix(prefix).replace("/", "."): name for name in weights}


def state_name(slot: str, name: str) -> str:
    """Name the state `slot` of a weight of the module as a checkpoint does."""
    return f"optimizer/{slot}/{name.replace('.', '/')}"


def stored_name(name: str, part: str) -> str:
    """Name a tensor of a stored weight: `codes`, `scales` or `zeros` of a weight of the module."""
    return f"{STORED}{name.replace('.', '/')}/{part}"


def stored_names(names: Iterable[str]) -> list[str]:
    """Return the stored weights among the names of a checkpoint, by the module's names."""
    ends = (name for name in names if name.startswith(STORED) and name.endswith("/codes"))
    return [name[len(STORED) : -len("/codes")].replace("/", ".") for name in ends]
