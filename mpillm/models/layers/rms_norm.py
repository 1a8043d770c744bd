"""RMSNorm (Zhang & Sennrich 2019) with a backward pass in few passes over memory, on CPUs.

Shapes: C width; N positions, of any number of dims.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """Divide each position by the root of its mean square, and scale it by a weight (C,).

    torch's own norm is the reference. On CPUs in float32 it differentiates operation by operation,
    which takes twice as long as `_RootMeanSquare`. 16 bits, GPUs and compiled layers take torch's.
    """

    def forward(self, x_NC: Tensor) -> Tensor:
        weight_C = self.scale()
        wide = x_NC.dtype == weight_C.dtype and x_NC.dtype in (torch.float32, torch.float64)
        if not wide or x_NC.device.type != "cpu" or torch.compiler.is_compiling():
            return F.rms_norm(x_NC, weight_C.shape, weight_C, self.eps)
        y_NC: Tensor = _RootMeanSquare.apply(x_NC, weight_C, self.eps)  # type: ignore[no-untyped-call]
        return y_NC

    def scale(self) -> Tensor:
        """Return the factors (C,) of the normalised features."""
        return self.weight


class RMSNorm1p(RMSNorm):
    """RMSNorm that scales by 1 + weight (Gemma): weight decay then pulls the factors to 1."""

    def scale(self) -> Tensor:
        return 1 + self.weight


class _RootMeanSquare(torch.autograd.Function):
    """y = x · r · weight, where r = (mean of x² + epsilon)^(−1/2)."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
        r_N1 = torch.linalg.vector_norm(x_NC, dim=-1, keepdim=True).square_()
        r_N1.mul_(1 / x_NC.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_NC, weight_C, r_N1)
        y_NC: Tensor = (x_NC * r_N1).mul_(weight_C)
        return y_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NC, weight_C, r_N1 = ctx.saved_tensors
        product_NC = (grad_NC * x_NC).reshape(-1, x_NC.shape[-1])
        r_N = r_N1.flatten()
        # Products with a vector sum without a matrix of the terms.
        grad_weight_C = r_N @ product_NC
        # d r / d x = −x · r³ / C, so each position has one factor on its x.
        factor_N = (product_NC @ weight_C).mul_(r_N.square()).mul_(-1 / x_NC.shape[-1])
        grad_x_NC = (grad_NC * weight_C).addcmul_(x_NC, factor_N.view(r_N1.shape)).mul_(r_N1)
        return grad_x_NC, grad_weight_C, None
