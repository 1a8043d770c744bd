"""A frozen linear layer with a low-rank adapter next to it: LoRA (Hu et al. 2021) and DoRA (Liu et
al. 2024).

Shapes: O outputs, I inputs, R rank of the adapter.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.layers.dropout import MaskKeys, drop
from mpillm.models.layers.quantized import StoredWeight, product

if TYPE_CHECKING:
    from mpillm.models.tuning import AdapterSettings


class Adapter(nn.Module):
    """The product scale · B · A, with the rows' lengths of DoRA."""

    def __init__(self, linear: nn.Linear, settings: "AdapterSettings") -> None:
        super().__init__()
        self.scale, self.dropout = settings.scale, settings.dropout
        self.place = 0
        """Of its mask in the layer."""
        self.keys: MaskKeys | None = None
        """The layer's keys of dropout masks in this pass; None: no dropout."""
        inputs, outputs = linear.in_features, linear.out_features
        self.a = nn.Parameter(torch.empty(settings.rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, settings.rank))
        dora = settings.method == "dora"
        self.magnitude = nn.Parameter(torch.empty(outputs)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the layer's output, of its input."""
        x = drop(x, self.dropout, self.keys, self.place)
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def factors(self, weight_OI: Tensor) -> Tensor | None:
        """Return DoRA's factor of each output (O,), of the layer's weight; None for LoRA.

        The length of a row is taken without its gradient (Liu et al. 2024, section 4.3).
        """
        if self.magnitude is None:
            return None
        with torch.no_grad():
            length_O = adapted_lengths(weight_OI, self.a, self.b, self.scale)
        return self.magnitude / length_O


class AdaptedLinear(nn.Module):
    """A linear layer whose own weight is frozen; `adapter` may be None."""

    def __init__(
        self, linear: nn.Linear, adapter: Adapter | None, stored: StoredWeight | None
    ) -> None:
        """`stored`: takes the place of the layer's weight, in fewer bits."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if stored is None:
            self.weight = linear.weight
        self.bias = linear.bias
        self.adapter, self.stored = adapter, stored

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight) if self.stored is None else product(x, self.stored)
        if self.adapter is not None:
            y = y + self.adapter(x)
            if self.adapter.magnitude is not None:
                weight_OI = self.weight if self.stored is None else self.stored.decoded(x.dtype)
                factor_O = self.adapter.factors(weight_OI)
                assert factor_O is not None
                y = y * factor_O
        return y if self.bias is None else y + self.bias


def adapted_lengths(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return the length (O,) of each row of weight + scale · B · A, without making the sum."""
    with_a_OR = F.linear(weight_OI, a_RI)
    a_squared_RR = a_RI @ a_RI.t()
    squares_O = weight_OI.square().sum(1)
    squares_O = squares_O + 2 * scale * (with_a_OR * b_OR).sum(1)
    squares_O = squares_O + scale**2 * ((b_OR @ a_squared_RR) * b_OR).sum(1)
    return squares_O.clamp_min(torch.finfo(squares_O.dtype).tiny).sqrt()


def merged(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None = None
) -> Tensor:
    """Return the weight of a plain layer that computes the same."""
    whole_OI: Tensor = weight_OI + scale * (b_OR @ a_RI)
    if magnitude_O is None:
        return whole_OI
    length_O = whole_OI.norm(dim=1).clamp_min(torch.finfo(whole_OI.dtype).tiny)
    factor_O: Tensor = magnitude_O / length_O
    return whole_OI * factor_O[:, None]
