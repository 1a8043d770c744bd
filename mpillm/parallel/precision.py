"""Select the dtypes in which a step computes."""

from contextlib import AbstractContextManager

import torch

from mpillm.parallel.step_plan import Precision

# Streams between stages and their gradients: float32, so that a stage rounds as it would inside one
# rank.
STREAM_DTYPE = torch.float32


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """Return torch's autocast, enabled where products have another type than float32."""
    lower = precision.dtype != "float32"
    dtype = getattr(torch, precision.dtype) if lower else None
    return torch.autocast(precision.device, dtype=dtype, enabled=lower)
