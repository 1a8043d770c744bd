"""The names of a checkpoint: one namespace for every layout, without torch.

    model/layers/0/attention/query/weight              a weight
    optimizer/exp_avg/layers/0/attention/query/weight  the optimizer's slot `exp_avg` of that weight

A name never mentions a rank, a stage or a shard: a layout is only a way to cut the whole tensor.
"""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def weight_tensors(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Rename weights from the module's names (`layers.0.norm.weight`) to a checkpoint's."""
    return {f"model/{name.replace('.', '/')}": value for name, value in weights.items()}


def slot_tensors(state: Mapping[tuple[str, str], Value]) -> dict[str, Value]:
    """Rename an optimizer's state, (slot, name of the weight) → value."""
    return {
        f"optimizer/{slot}/{name.replace('.', '/')}": value for (slot, name), value in state.items()
    }
