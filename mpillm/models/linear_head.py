"""The output of a model before its last product: hidden states and the head's weight.

A loss may read it in chunks, so that the logits of all positions never exist at once.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearHead(NamedTuple):
    """Logits that are not computed yet: hidden · weightᵀ + bias, in the dtype of `hidden`."""

    hidden_BTC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None = None

    @classmethod
    def of(cls, hidden_BTC: Tensor, linear: nn.Linear) -> "LinearHead":
        """Return the head `linear` over `hidden_BTC`, in autocast's dtype where it is enabled."""
        device = hidden_BTC.device.type
        if torch.is_autocast_enabled(device):
            hidden_BTC = hidden_BTC.to(torch.get_autocast_dtype(device))
        return cls(hidden_BTC, linear.weight, linear.bias)

    def logits(self) -> Tensor:
        """Compute all logits, (B, T, V)."""
        dtype = self.hidden_BTC.dtype
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return F.linear(self.hidden_BTC, self.weight_VC.to(dtype), bias_V)


Outputs = tuple[Tensor | LinearHead, ...]


def plain_outputs(outputs: Iterable[Tensor | LinearHead]) -> tuple[Tensor, ...]:
    """Replace each head by its logits, for code that reads tensors."""
    return tuple(each.logits() if isinstance(each, LinearHead) else each for each in outputs)
