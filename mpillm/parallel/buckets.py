"""Gradients in a few flat buckets: each parameter's `grad` becomes a view into one.

So a reduction takes a few large messages. The buckets hold the parameters in reverse
order, since the backward pass completes them so (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpillm.comm.group import Group, Handle, Prepared
from mpillm.comm.node import SharedRows

# Each gradient begins on a cache line of its own.
ALIGNMENT_BYTES = 64
NORM_PIECE_ELEMENTS = 32 * 1024


@dataclass(eq=False)
class Bucket:
    """Some gradients in one flat row of memory."""

    flat: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]
    """The gradient of each parameter, in its shape, inside `flat`."""
    sum: Prepared
    """The all-reduce of `flat`."""
    shared: SharedRows | None = None
    """The memory that `flat` is a row of, where the ranks of a node share it."""
    missing: int = 0
    """Gradients that the last microbatch still owes."""
    handle: Handle | None = None
    """The sum, where it has begun."""


def group_parameters(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Cut the reversed list into runs of at most `bucket_bytes` (at least one parameter each), one dtype a
    run.
    """
    groups: list[list[nn.Parameter]] = []
    for dtype in dict.fromkeys(parameter.dtype for parameter in reversed(parameters)):
        filled = math.inf
        for parameter in reversed(parameters):
            if parameter.dtype == dtype:
                size = padded(parameter) * parameter.itemsize
                if filled + size > bucket_bytes:
                    groups.append([])
                    filled = 0
                groups[-1].append(parameter)
                filled += size
    return groups


def padded(parameter: Tensor) -> int:
    """Elements that the gradient takes in its bucket, rounded up to whole cache lines."""
    line = ALIGNMENT_BYTES // parameter.itemsize
    return -(-parameter.numel() // line) * line


def make_bucket(parameters: list[nn.Parameter], group: Group, algorithm: str, share: bool) -> Bucket:
    """A bucket of zeros with room for the gradient of each of `parameters`; in memory that the node's ranks share, if
    `share` and if it can be had. Every rank of `group` makes it.
    """
    dtype, count = parameters[0].dtype, sum(map(padded, parameters))
    shared = group.allocate(count, str(dtype).removeprefix("torch.")) if share else None
    flat = torch.zeros(count, dtype=dtype) if shared is None else torch.from_numpy(shared.own).view(dtype)
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += padded(parameter)
    return Bucket(flat, parameters, views, group.prepare("allreduce", flat, algorithm=algorithm), shared)


def lay(parameter: nn.Parameter, view: Tensor) -> None:
    """Make `view` the parameter's gradient, with the values of the one that it had; zeros if it had none."""
    if parameter.grad is view:
        return
    if parameter.grad is None:
        view.zero_()
    else:
        view.copy_(parameter.grad)
    parameter.grad = view


def square_sum(flat: Tensor) -> float:
    """The sum of squares of `flat` in float64."""
    # In pieces that stay in the cache: vector_norm(dtype=float64) takes six times as long (60 ms for 19 M
    # elements).
    total = 0.0
    for first in range(0, flat.numel(), NORM_PIECE_ELEMENTS):
        wide = flat[first : first + NORM_PIECE_ELEMENTS].double()
        total += float(torch.dot(wide, wide))
    return total
