"""A linear layer with a stored weight, which takes the kernel that is fastest for its rows.

Shapes: R rows of inputs, O outputs, I inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.layers.stored.packed_linear import (
    MOST_HEAD_ROWS,
    packed_linear,
    packed_weight,
    packing_works,
)
from mpillm.models.layers.stored.stored_codes import BYTES, StoredCodes, StoredFormat
from mpillm.models.layers.stored.stored_kernels import (
    StoredKernel,
    choose_kernel,
    integer_product,
    pack,
    packed_product,
)


def is_packed(x: Tensor) -> bool:
    """Return whether products of `x` take weights in oneDNN's order."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and packing_works()


class StoredLinear(nn.Module):
    """x · weightᵀ + bias, where the weight is stored as codes; for inference.

    The packed codes, and the decoded copy for many rows, are made when they are first needed. A
    gradient of the inputs passes through the copy; the weight has none.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, layout: StoredFormat, shape: tuple[int, int], bias: nn.Parameter | None = None
    ) -> None:
        """Allocate it without values."""
        super().__init__()
        self.format, self.shape = layout, shape
        self.out_features, self.in_features = shape
        self.bias = bias
        self.kernel: StoredKernel | None = None
        """Taken for any number of rows; None: chosen by them."""
        self.register_buffer("zeros", None)
        for name, (dtype, size) in layout.tensors_of(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=getattr(torch, dtype)))
        self._packed: tuple[Tensor, Tensor] | None = None
        self._copy: Tensor | None = None
        self._ordered: Tensor | None = None
        self._scale_O: Tensor | None = None

    @property
    def stored(self) -> StoredCodes:
        """The tensors of the weight, which share its memory."""
        tensors = {name: getattr(self, name) for name in self.format.tensors_of(self.shape)}
        return StoredCodes(self.format, tensors)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a weight."""
        for name in self.format.tensors_of(self.shape):
            getattr(self, name).copy_(tensors[name])
        self.forget()

    def forget(self) -> None:
        """Drop what was made of the codes."""
        self._packed = self._scale_O = self._copy = self._ordered = None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I) in `dtype`; it is decoded once and kept."""
        copy = self._copy
        if copy is None or copy.dtype != dtype or copy.device != self.codes.device:
            # A tensor of inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                copy = self._copy = self.stored.decoded(dtype)
        return copy

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        kernel = self.kernel or choose_kernel(rows, self.shape, self.format, x.device)
        learns = x.requires_grad and torch.is_grad_enabled()
        if kernel == "copy" and not learns and is_packed(x):
            return packed_linear(x, self._order(), self.bias)
        if kernel == "copy" or learns:
            return F.linear(x, self.decoded(x.dtype), self.bias)
        x_RI = x.reshape(rows, self.in_features)
        if kernel == "packed":
            y_RO = packed_product(x_RI.to(torch.bfloat16), self._pack(), self.format).to(x.dtype)
        else:
            if self._scale_O is None:
                self._scale_O = self.scales[:, 0].float()
            y_RO = integer_product(x_RI, self.codes, self._scale_O)
        y = y_RO.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _order(self) -> Tensor:
        """Return the decoded weight in oneDNN's order, in place of a copy in ours."""
        if self._ordered is None:
            self._ordered = packed_weight(self.stored.decoded(torch.bfloat16))
        return self._ordered

    def _pack(self) -> tuple[Tensor, Tensor]:
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack(self.stored)
        return self._packed


class StoredHead(nn.Linear):
    """A head with its weight, which losses over many positions read, and with int8 codes of it.

    Generation multiplies a few positions by the codes: half of the bytes of bfloat16.
    """

    def __init__(self, linear: nn.Linear, stored: StoredCodes) -> None:
        """Take the parameters of `linear`, whose weight is what `stored` means."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.few = StoredLinear(BYTES, stored.shape)
        self.few.fill(stored.tensors)

    def product(self, x: Tensor) -> Tensor | None:
        """Return x · weightᵀ of few rows; None of many, and where a gradient is wanted."""
        rows = x.numel() // self.in_features
        if rows > MOST_HEAD_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            return None
        few = choose_kernel(rows, self.few.shape, BYTES, x.device) == "packed"
        if not few and not is_packed(x):
            return None
        made: Tensor = self.few(x)
        return made
