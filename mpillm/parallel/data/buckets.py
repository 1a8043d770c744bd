"""Gradients in a few flat buckets: each parameter's `grad` becomes a view into one.

So a reduction takes a few large messages. The buckets hold the parameters in reverse
order, since the backward pass completes them so (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator, Handle, PersistentCollective
from mpillm.comm.shared.team import SharedRows

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
    sum: PersistentCollective
    """The all-reduce of `flat`."""
    shared: SharedRows | None = None
    """The memory that `flat` is a row of, where the ranks of a node share it."""
    stage: int = 0
    """Which of the rank's parts of the model the parameters belong to."""
    missing: int = 0
    """Gradients that the last microbatch still owes."""
    handle: Handle | None = None
    """The sum, where it has begun."""
    folded: list[Tensor] = field(default_factory=list)
    """With a fixed order: sums of 2ᵏ microbatches each, the longest first."""
    leaves: int = 0
    """Microbatches in `folded`."""

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def lay_all(self) -> None:
        """Make every view its parameter's gradient."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            lay(parameter, view)

    def fold(self) -> None:
        """Put the gradients, one microbatch's, into the tree of trees.tree_split, as a binary counter counts."""
        total, place = self.flat.clone(), self.leaves
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


def make_bucket(
    parameters: list[nn.Parameter],
    group: Communicator,
    algorithm: str,
    share: bool,
    stage: int,
    fixed_order: bool,
) -> Bucket:
    """A bucket of zeros with room for the gradient of each of `parameters`; in memory that the node's ranks share, if
    `share` and if it can be had. Every rank of `group` makes it.
    """
    dtype, count = parameters[0].dtype, sum(map(padded, parameters))
    shared = group.allocate(count, str(dtype).removeprefix("torch.")) if share else None
    flat = (
        torch.zeros(count, dtype=dtype)
        if shared is None
        else torch.from_numpy(shared.own).view(dtype)
    )
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += padded(parameter)
    prepared = group.prepare("allreduce", flat, algorithm=algorithm, fixed_order=fixed_order)
    return Bucket(flat, parameters, views, prepared, shared, stage, missing=len(parameters))


def lay(parameter: nn.Parameter, view: Tensor) -> None:
    """Make `view` the parameter's gradient, with the values of the one that it had; zeros if it had none."""
    if parameter.grad is view:
        return
    if parameter.grad is None:
        view.zero_()
    else:
        view.copy_(parameter.grad)
    parameter.grad = view


def norm_pieces(
    gradients: Iterable[tuple[nn.Parameter, Tensor]], twins: Collection[nn.Parameter]
) -> list[Tensor]:
    """The gradients of all parameters but `twins`, each flat and cut from its own beginning into pieces that stay in
    the cache: in float64 a whole one takes six times as long (60 ms for 19 M elements).
    """
    return [
        piece
        for parameter, gradient in gradients
        if not any(parameter is twin for twin in twins)
        for piece in torch.split(gradient.reshape(-1), NORM_PIECE_ELEMENTS)
    ]


def square_sum(piece: Tensor) -> float:
    """The sum of squares of `piece` in float64."""
    wide = piece.double()
    return float(torch.dot(wide, wide))
