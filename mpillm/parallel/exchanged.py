"""An exchange between ranks as a function of autograd, whose backward pass is another exchange."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Exchange = Callable[[Tensor], Tensor]


def exchanged(x: Tensor, there: Exchange, back: Exchange) -> Tensor:
    """Return `there(x)`; its gradient passes through `back`.

    Every rank of the exchange calls it, and reaches the backward pass, in one order.
    """
    found: Tensor = _Exchanged.apply(x, there, back)  # type: ignore[no-untyped-call]
    return found


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None
