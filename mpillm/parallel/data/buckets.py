"""Gradients in a few flat buckets: each parameter's `grad` becomes a view into one.

A reduction then takes a few large messages. The buckets hold the parameters in reverse order, in
which the backward pass completes them (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2).

Gradients of bfloat16 and float16 parameters are added up in float32 buckets: a sum over
microbatches would lose small terms. Autograd gives each in the parameter's dtype, and `grad` is
empty afterwards.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator
from mpillm.comm.persistent import PersistentCollective
from mpillm.comm.shared.team import SharedRows
from mpillm.parallel.data.sum_tree import SumTree

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
    """The all-reduce of `flat`, or of `wire`."""
    wire: Tensor | None = None
    """A copy of `flat` in a lower dtype, which is summed in its place."""
    shared: SharedRows | None = None
    """The shared memory that holds `flat`, where the ranks of a node share it."""
    part: int = 0
    """The rank's part of the model to which the parameters belong."""
    missing: int = 0
    """Gradients of the last microbatch that are still incomplete."""
    handle: PersistentCollective | None = None
    """The sum in flight; None before it starts."""
    folded: SumTree = field(default_factory=SumTree)
    """With a fixed order: the sums of microbatches."""
    stream: "torch.cuda.Stream | None" = None
    """Where a sum on a GPU is enqueued, so that it overlaps with the backward pass."""
    filled: set[nn.Parameter] = field(default_factory=set)
    """Parameters of a lower dtype than `flat` whose view holds a gradient of this step."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter with its gradient."""
        return zip(self.parameters, self.views, strict=True)

    def forget(self) -> None:
        """Drop the gradients; autograd then stores its next one without adding."""
        for parameter in self.parameters:
            parameter.grad = None
        self.filled.clear()

    @property
    def adds(self) -> bool:
        """Whether gradients of a lower dtype are added to the views, instead of laid into them."""
        return self.flat.dtype != self.parameters[0].dtype

    def take(self, parameter: nn.Parameter, view: Tensor) -> None:
        """Take the gradient that autograd has left in `parameter.grad`."""
        if not self.adds:
            lay(parameter, view)
            return
        assert parameter.grad is not None
        if parameter in self.filled:
            view.add_(parameter.grad)
        else:
            view.copy_(parameter.grad)
            self.filled.add(parameter)
        parameter.grad = None

    def take_all(self) -> None:
        """Complete the views: zeros for a parameter that no backward pass has reached."""
        for parameter, view in self.gradients():
            if not self.adds:
                lay(parameter, view)
            elif parameter not in self.filled:
                view.zero_()

    def start_sum(self) -> None:
        """Start the all-reduce over the data axis."""
        with self._overlapped():
            if self.wire is not None:
                self.wire.copy_(self.flat)
            self.handle = self.sum.start()

    def _overlapped(self) -> "AbstractContextManager[object]":
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.flat.device))
        return torch.cuda.stream(self.stream)

    def run_sum(self) -> None:
        """Run the all-reduce over the data axis."""
        if self.wire is not None:
            self.wire.copy_(self.flat)
        self.sum.run()

    def end_step(self) -> None:
        """Take the sum where another dtype held it, after the all-reduce; prepare the next step."""
        if self.stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self.stream)
        if self.wire is not None:
            self.flat.copy_(self.wire)
        self.handle = None
        self.missing = len(self.parameters)

    def fold(self) -> None:
        """Add the gradients of one microbatch to the tree of sums."""
        self.folded.add(self.flat.clone())
        self.forget()

    def unfold(self) -> None:
        """Leave the whole sum in `flat`, and an empty tree."""
        total = self.folded.take()
        if total is not None:
            self.flat.copy_(total)
            for parameter, view in self.gradients():
                if self.adds:
                    self.filled.add(parameter)
                else:
                    parameter.grad = view


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
                size = padded(parameter) * summed_dtype(parameter.dtype).itemsize
                if filled + size > bucket_bytes:
                    groups.append([])
                    filled = 0
                groups[-1].append(parameter)
                filled += size
    return groups


def summed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of `dtype` are added up: float32 at least."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def padded(parameter: Tensor) -> int:
    """Return the elements of the gradient in its bucket, rounded up to whole cache lines."""
    line = ALIGNMENT_BYTES // summed_dtype(parameter.dtype).itemsize
    return -(-parameter.numel() // line) * line


def make_bucket(
    parameters: list[nn.Parameter],
    group: Communicator,
    algorithm: str,
    share: bool,
    part: int,
    fixed_order: bool,
    reduce_dtype: torch.dtype = torch.float32,
) -> Bucket:
    """Allocate a bucket of zeros with room for the gradient of each of `parameters`, and prepare
    its all-reduce, in `reduce_dtype` where that is lower.

    With `share`, what is summed is in memory that the node's ranks share, where it can be
    allocated. Every rank of `group` calls it.
    """
    own, count = summed_dtype(parameters[0].dtype), sum(map(padded, parameters))
    lower = group.size > 1 and reduce_dtype.itemsize < own.itemsize
    dtype, device = reduce_dtype if lower else own, parameters[0].device
    share = share and device.type == "cpu"
    shared = group.allocate(count, str(dtype).removeprefix("torch.")) if share else None
    summed = (
        torch.zeros(count, dtype=dtype, device=device)
        if shared is None
        else torch.from_numpy(shared.own).view(dtype)
    )
    flat = torch.zeros(count, dtype=own, device=device) if lower else summed
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += padded(parameter)
    prepared = group.prepare("allreduce", summed, algorithm=algorithm, fixed_order=fixed_order)
    wire = summed if lower else None
    return Bucket(flat, parameters, views, prepared, wire, shared, part, missing=len(parameters))


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
    NORM_PIECE_ELEMENTS; on a GPU a piece is a whole gradient.

    A piece starts at a multiple of that from its parameter's beginning, so the cuts are the same in
    every layout.
    """
    apart = {id(parameter) for parameter in excluded}
    return [
        piece
        for parameter, gradient in gradients
        if id(parameter) not in apart
        for piece in torch.split(
            gradient.reshape(-1), gradient.numel() if gradient.is_cuda else NORM_PIECE_ELEMENTS
        )
    ]
