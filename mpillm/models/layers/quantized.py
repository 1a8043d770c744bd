"""Frozen weights in fewer bits: bfloat16, int8 with a scale a row, int4 with a scale a group.

Values are rounded to the nearest. A product decodes the weight each time that it is used, in the
backward pass again: no decoded copy is kept. A kernel that reads the codes takes the place of
`product` alone.

Shapes: O outputs, I inputs, G groups of a row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.tuning import BaseFormat

GROUP = 64
"""Inputs that share a scale in int4."""


class StoredWeight:
    """A weight (O, I) in `kind`, whose memory may be moved: `tensors` are read at each use."""

    def __init__(self, shape: tuple[int, ...], kind: BaseFormat) -> None:
        """Allocate it without values."""
        self.kind, self.shape = kind, shape
        outputs, inputs = shape
        groups = -(-inputs // GROUP)
        if kind == "int4":
            # Two codes a byte.
            codes = torch.empty(outputs, groups * GROUP // 2, dtype=torch.uint8)
            self.tensors = [codes, torch.empty(outputs, groups)]
        elif kind == "int8":
            codes = torch.empty(outputs, inputs, dtype=torch.int8)
            self.tensors = [codes, torch.empty(outputs, 1)]
        else:
            dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
            self.tensors = [torch.empty(shape, dtype=dtype)]

    @torch.no_grad()
    def fill(self, values_OI: Tensor) -> None:
        """Store the values, rounded."""
        values_OI = values_OI.float()
        if self.kind == "int8":
            scale_O1 = _scales(values_OI, 127)
            self.tensors[0].copy_(_codes(values_OI, scale_O1, 127))
            self.tensors[1].copy_(scale_O1)
        elif self.kind == "int4":
            padded = F.pad(values_OI, (0, -values_OI.shape[1] % GROUP))
            groups_OGN = padded.view(len(padded), -1, GROUP)
            scale_OG1 = _scales(groups_OGN, 7)
            # From 1 to 15: a half byte has no sign.
            codes = (_codes(groups_OGN, scale_OG1, 7) + 8).to(torch.uint8).flatten(1)
            self.tensors[0].copy_(codes[:, ::2] | (codes[:, 1::2] << 4))
            self.tensors[1].copy_(scale_OG1[..., 0])
        else:
            self.tensors[0].copy_(values_OI)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (O, I)."""
        if self.kind == "int8":
            codes, scale_O1 = self.tensors
            return (codes * scale_O1).to(dtype)
        if self.kind == "int4":
            packed, scale_OG = self.tensors
            codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).to(torch.int8) - 8
            groups_OGN: Tensor = codes.view(len(codes), -1, GROUP) * scale_OG[..., None]
            return groups_OGN.flatten(1)[:, : self.shape[1]].to(dtype)
        return self.tensors[0].to(dtype)


def rounded(values_OI: Tensor, kind: BaseFormat) -> Tensor:
    """Return the values that a weight has when it is stored in `kind`, in float32."""
    if kind == "float32":
        return values_OI.float()
    stored = StoredWeight(tuple(values_OI.shape), kind)
    stored.fill(values_OI)
    return stored.decoded()


def product(x: Tensor, weight: StoredWeight) -> Tensor:
    """Return x · weightᵀ; only `x` has a gradient."""
    found: Tensor = _FrozenProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return found


class _FrozenProduct(torch.autograd.Function):
    """Saves neither the input nor the decoded weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.decoded(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.decoded(gradient.dtype), None


def _scales(values: Tensor, largest: int) -> Tensor:
    """Return the scale of each row along the last dim; 1 for a row of zeros."""
    scale = values.abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (values / scale).round_().clamp_(-largest, largest)
