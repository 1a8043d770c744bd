"""Gradients in a few flat buckets: each parameter's `grad` becomes a view into one.

A reduction then takes a few large messages. The buckets hold the parameters in reverse order, in
which the backward pass completes them (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).
"""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator
from mpillm.comm.persistent import PersistentCollective
from mpillm.comm.shared.team import SharedRows

# Each gradient begins on a cache line of its own, so that two ranks never write to one line.
ALIGNMENT_BYTES = 64
# 256 KiB in float64: a piece stays in the second cache. A whole gradient of 19 M elements takes six
# times as long.
NORM_PIECE_ELEMENTS = 32 * 1024


@dataclass(eq=False)
class Bucket:
    """Gradients of several parameters in one flat tensor, and their all-reduce."""

    flat: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]
    """The gradient of each parameter, in its shape, inside `flat`."""
    sum: PersistentCollective
    """The all-reduce of `flat`."""
    shared: SharedRows | None = None
    """The shared memory that holds `flat`, where the ranks of a node share it."""
    part: int = 0
    """The rank's part of the model to which the parameters belong."""
    missing: int = 0
    """Gradients of the last microbatch that are still incomplete."""
    handle: PersistentCollective | None = None
    """The sum in flight; None before it starts."""
    folded: list[Tensor] = field(default_factory=list)
    """With a fixed order: sums of 2ᵏ microbatches each, the largest k first."""
    leaves: int = 0
    """Microbatches in `folded`."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter with its gradient."""
        return zip(self.parameters, self.views, strict=True)

    def forget(self) -> None:
        """Drop the gradients; autograd then stores its next one without adding."""
        for parameter in self.parameters:
            parameter.grad = None

    def lay_all(self) -> None:
        """Make every view its parameter's gradient."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            lay(parameter, view)

    def fold(self) -> None:
        """Add the gradients of one microbatch to the tree of sums, as a binary counter carries."""
        total, place = self.flat.clone(), self.leaves
        # A set low bit of `leaves` is a sum of equal size: merge, as in trees.tree_split.
        while place & 1:
            total = self.folded.pop().add_(total)
            place >>= 1
        self.folded.append(total)
        self.leaves += 1
        self.forget()

    def unfold(self) -> None:
        """Leave the whole sum in `flat`, and an empty tree."""
        if self.folded:
            total = self.folded.pop()
            while self.folded:
                total = self.folded.pop().add_(total)
            self.flat.copy_(total)
            for parameter, view in zip(self.parameters, self.views, strict=True):
                parameter.grad = view
        self.leaves = 0


def group_parameters(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Cut the reversed list into runs of at most `bucket_bytes`, one dtype each, of at least one
    parameter.
    """
    groups: list[list[nn.Parameter]] = []
    for dtype in dict.fromkeys(parameter.dtype for parameter in reversed(parameters)):
        # inf opens the first bucket of this dtype.
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
    """Return the elements of the gradient in its bucket, rounded up to whole cache lines."""
    line = ALIGNMENT_BYTES // parameter.itemsize
    return -(-parameter.numel() // line) * line


def make_bucket(
    parameters: list[nn.Parameter],
    group: Communicator,
    algorithm: str,
    share: bool,
    part: int,
    fixed_order: bool,
) -> Bucket:
    """Allocate a bucket of zeros with room for the gradient of each of `parameters`, and prepare
    its all-reduce.

    With `share`, in memory that the node's ranks share, where it can be allocated. Every rank of
    `group` calls it.
    """
    dtype, count = parameters[0].dtype, sum(map(padded, parameters))
    shared = group.allocate(count, str(dtype).removeprefix("torch.")) if share else None
    flat = (
        torch.zeros(count, dtype=dtype, device=parameters[0].device)
        if shared is None
        else torch.from_numpy(shared.own).view(dtype)
    )
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += padded(parameter)
    prepared = group.prepare("allreduce", flat, algorithm=algorithm, fixed_order=fixed_order)
    return Bucket(flat, parameters, views, prepared, shared, part, missing=len(parameters))


def lay(parameter: nn.Parameter, view: Tensor) -> None:
    """Make `view` the parameter's gradient, keeping the values of the one it had; zeros if it had
    none.
    """
    if parameter.grad is view:
        return
    if parameter.grad is None:
        view.zero_()
    else:
        view.copy_(parameter.grad)
    parameter.grad = view


def norm_pieces(
    gradients: Iterable[tuple[nn.Parameter, Tensor]], excluded: Collection[nn.Parameter]
) -> list[Tensor]:
    """Cut the flat gradient of each parameter, but `excluded` ones, into pieces of
    NORM_PIECE_ELEMENTS.

    A piece starts at a multiple of that from its parameter's beginning, so the cuts are the same in
    every layout.
    """
    return [
        piece
        for parameter, gradient in gradients
        if not any(parameter is other for other in excluded)
        for piece in torch.split(gradient.reshape(-1), NORM_PIECE_ELEMENTS)
    ]
