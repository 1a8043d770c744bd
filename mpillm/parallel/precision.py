"""Put a part of the model into the dtype of a step, and keep the float32 values for its masters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mpillm.parallel.step_plan import Precision


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of the name `float32`, `bfloat16` or `float16`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def lower_(parameters: Iterable[nn.Parameter], precision: Precision) -> dict[nn.Parameter, Tensor]:
    """Convert `parameters` in place; return the values that they had.

    The Parameter objects stay the same, so tied ones stay tied. Buffers keep their dtype: tables of
    angles would lose their precision. Without masters nothing changes, and nothing is returned.
    """
    if not precision.has_masters:
        return {}
    values = {parameter: parameter.data for parameter in parameters}
    for parameter, value in values.items():
        parameter.data = value.to(torch_dtype(precision.dtype))
    return values
