"""The output of a model before its last product: hidden states and the head's weight.

A loss may read it in chunks, so that the logits of all positions never exist at once.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VocabularyShard(NamedTuple):
    """The tokens of a vocabulary whose logits a head gives, where several heads share them.

    All heads have the same hidden states, and call the functions together, in one order.
    """

    first: int
    """The number of the first token; the others follow."""
    vocabulary: int
    """The tokens of all heads."""
    most: int
    """The tokens of the largest shard."""
    maximum: Callable[[Tensor], None]
    """Replace each value by the largest of all heads."""
    total: Callable[[Tensor], None]
    """Replace each value by the sum over all heads."""
    join: Callable[[Tensor], Tensor]
    """Return the logits (…, V) of all heads, from those of one."""


class LinearHead(NamedTuple):
    """Logits that are not computed yet: hidden · weightᵀ + bias, in the dtype of `hidden`.

    With a soft cap they are cap × tanh(logit / cap) of it (Gemma 2); 0: no cap. With a `shard` the
    weight has its rows alone, and the gradient of `hidden` is the share of these.
    """

    hidden_BTC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None = None
    soft_cap: float = 0.0
    shard: VocabularyShard | None = None
    product: Callable[[Tensor], Tensor | None] | None = None
    """What gives hidden · weightᵀ faster than the weight itself, of few positions; None of many."""

    @classmethod
    def of(cls, hidden_BTC: Tensor, linear: nn.Linear, soft_cap: float = 0.0) -> "LinearHead":
        """Return the head `linear` over `hidden_BTC`, in autocast's dtype where it is enabled."""
        device = hidden_BTC.device.type
        if torch.is_autocast_enabled(device):
            hidden_BTC = hidden_BTC.to(torch.get_autocast_dtype(device))
        product = getattr(linear, "product", None)
        return cls(hidden_BTC, linear.weight, linear.bias, soft_cap, product=product)

    def logits(self) -> Tensor:
        """Compute all logits, (B, T, V)."""
        dtype = self.hidden_BTC.dtype
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        made = None if self.product is None else self.product(self.hidden_BTC)
        if made is None:
            logits_BTV = F.linear(self.hidden_BTC, self.weight_VC.to(dtype), bias_V)
        else:
            logits_BTV = made if bias_V is None else made + bias_V
        if self.soft_cap:
            logits_BTV = self.soft_cap * (logits_BTV / self.soft_cap).tanh()
        return logits_BTV if self.shard is None else self.shard.join(logits_BTV)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may have gradients."""
        return self.hidden_BTC, self.weight_VC, self.bias_V


Outputs = tuple[Tensor | LinearHead, ...]


def plain_outputs(outputs: Iterable[Tensor | LinearHead]) -> tuple[Tensor, ...]:
    """Replace each head by its logits, for code that reads tensors."""
    return tuple(each.logits() if isinstance(each, LinearHead) else each for each in outputs)
