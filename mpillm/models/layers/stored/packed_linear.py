"""Linear layers whose bfloat16 weights are ordered for oneDNN once, and not in each product.

For inference on CPUs. The kernel has a private name: it is compared once with the plain product,
and where it differs, fails or is missing, layers stay as they are. Shapes: R rows of inputs, O
outputs, I inputs.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.layers.stored.stored_kernels import has_bfloat16_units, near

# Of a head: more rows have nearly the time of a plain product, and the ordered copy is large.
MOST_HEAD_ROWS = 64


class PackedLinear(nn.Module):
    """x · weightᵀ + bias; the weight exists in oneDNN's order alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = packed_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self._packed, self.bias)


class PackedHead(nn.Linear):
    """A head with its weight, which an embedding may share, and an ordered copy for few rows."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take the parameters of `linear`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = packed_weight(linear.weight.detach())

    def product(self, x: Tensor) -> Tensor | None:
        """Return x · weightᵀ of few rows; None of many."""
        few = x.numel() // self.in_features <= MOST_HEAD_ROWS
        return packed_linear(x, self._packed, None) if few else None


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a model in bfloat16 on a CPU, where the kernel works."""
    weight = next(model.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not packing_works():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Layers that replaced plain ones have weights of their own kind.
            if type(child) is nn.Linear:
                made = PackedHead(child) if name == "head" else PackedLinear(child)
                setattr(module, name, made)


def packed_weight(weight_OI: Tensor) -> Tensor:
    """Return the weight in oneDNN's order."""
    operations: Any = torch.ops.mkldnn
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = operations._reorder_linear_weight(weight_OI.contiguous())
    return found


def packed_linear(x: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x · weightᵀ + bias."""
    operations: Any = torch.ops.mkldnn
    found: Tensor = operations._linear_pointwise(x, packed, bias_O, "none", [], "")
    return found


@cache
def packing_works() -> bool:
    """Compare the kernel with the plain product, once; without bfloat16 units it is not taken."""
    if not has_bfloat16_units():
        return False
    chance = torch.Generator().manual_seed(1)
    x_RI, weight_OI = (torch.randn(n, 96, generator=chance).bfloat16() for n in (3, 80))
    try:
        found_RO = packed_linear(x_RI, packed_weight(weight_OI), None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return near(found_RO, F.linear(x_RI.float(), weight_OI.float()))
