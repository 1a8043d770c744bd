"""Gradients meet: those of all microbatches and of all ranks along the data axis are summed.

Sums are never divided: who calls scales the loss of each microbatch by 1 / (tokens of the global batch), and the sum
over microbatches and ranks is the mean over all tokens, however unequal the shares.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.progress_thread import ProgressThread
from mpillm.comm.selection import Profile
from mpillm.errors import CommError
from mpillm.parallel.data.buckets import (
    Bucket,
    group_parameters,
    lay,
    make_bucket,
    norm_pieces,
    padded,
    square_sum,
)
from mpillm.parallel.settings import ParallelSettings

if TYPE_CHECKING:
    from mpi4py import MPI

# Measured in docs/notes.md: how long the thread that moves messages behind the backward pass sleeps between two looks.
PROGRESS_SECONDS = 1e-3
# Behind the backward pass the first bucket should set out early; after it few, long ones are best.
BEHIND_BYTES, AFTER_BYTES = 4 << 20, 32 << 20


class GradientBuckets:
    """The gradients of `stages`, a rank's parts of the model by their parameters (tied ones once, frozen ones not at
    all), of any float types, on the CPU.

    Every rank of `axis` makes it, with the same parameters in the same order; differing ones raise CommError.
    After `reduce` each parameter's `grad` is a view into a bucket; one that no backward pass reached is zero. Where
    there is nothing to sum, on an axis of one rank, there are no buckets: gradients stay where autograd put them.
    """

    def __init__(
        self,
        stages: Sequence[Iterable[nn.Parameter]],
        axis: Axis,
        settings: ParallelSettings,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
        *,
        fixed_order: bool = False,
    ) -> None:
        """`profile`: the cluster's, which chooses algorithms; `warn` is told what had to be done without.

        `fixed_order`: sum in the one tree over all microbatches of all ranks, in rank order (trees.py); the caller
        then calls `fold` behind each microbatch of a stage, in ascending order, as often as a power of two on more than
        one rank.
        """
        self.axis, self.settings, self.fixed_order = axis, settings, fixed_order
        self._group = Communicator(axis.comm, profile=profile, debug=settings.debug, warn=warn)
        self.behind = axis.size > 1 and self._overlaps()
        nbytes = settings.bucket_bytes or (BEHIND_BYTES if self.behind else AFTER_BYTES)
        # The last stage first: its last backward pass comes first.
        trained = [
            list(dict.fromkeys(p for p in parameters if p.requires_grad)) for parameters in stages
        ]
        groups = [
            (stage, group)
            for stage, parameters in reversed(list(enumerate(trained)))
            for group in group_parameters(parameters, nbytes)
        ]
        self._check_layout([group for _, group in groups])
        self._loose = (
            []
            if axis.size > 1 or fixed_order
            else [p for parameters in trained for p in parameters]
        )
        groups = [] if self._loose else groups
        self._thread = ProgressThread(self._group, PROGRESS_SECONDS) if self.behind else None
        share = settings.allreduce in ("auto", "shared", "two-level") and axis.size > len(
            self._group.nodes
        )
        self.buckets = [
            make_bucket(group, self._group, settings.allreduce, share, stage, fixed_order)
            for stage, group in groups
        ]
        self._last: set[int] = set()
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                hook = _Hook(self, bucket, view)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _overlaps(self) -> bool:
        if self.fixed_order:
            return False
        if self.settings.overlap == "auto":
            return len(self._group.nodes) > 1
        return self.settings.overlap == "behind"

    @property
    def algorithms(self) -> list[str]:
        """What sums the buckets, without repetition."""
        return list(dict.fromkeys(bucket.sum.algorithm for bucket in self.buckets))

    def _check_layout(self, groups: list[list[nn.Parameter]]) -> None:
        own = [(sum(map(padded, group)), str(group[0].dtype), len(group)) for group in groups]
        for rank, other in enumerate(self.axis.comm.allgather(own)):
            if other != own:
                raise CommError(
                    f"gradients can be summed only where all ranks train the same parameters: rank {self.axis.rank} "
                    f"has buckets {own}, rank {rank} has {other}; give every rank the same model and settings"
                )

    def close(self) -> None:
        """Let go of the gradients and of shared memory. Every rank of the axis calls it; nothing else after it."""
        self.zero()
        for bucket in self.buckets:
            bucket.views.clear()
            bucket.flat = torch.empty(0)
            if bucket.shared is not None:
                bucket.shared.free()
        self.buckets = []
        if self._thread is not None:
            self._thread.end()
        self._group.free()

    def zero(self) -> None:
        """Forget all gradients, before the first backward pass of a step."""
        # Autograd then hands its first gradient over as it is, and one copy lays it into the bucket: that
        # reads and writes less than clearing the bucket and adding to it (measured: 7 ms of a step for 17 M
        # parameters).
        for bucket in self.buckets:
            bucket.forget()
        for parameter in self._loose:
            parameter.grad = None

    def begin_last_microbatch(self, stage: int | None = None) -> None:
        """Call ahead of a step's last backward pass of `stage` (None: of all): behind it, complete buckets start on
        their way.
        """
        self._last |= {bucket.stage for bucket in self.buckets} if stage is None else {stage}

    def completed(self, bucket: Bucket) -> None:
        """One more gradient of `bucket` is final: start what is complete, and make the library move."""
        if bucket.stage not in self._last:
            return
        bucket.missing -= 1
        if self._thread is None:
            return
        # In bucket order, whatever order this rank's graph had: all ranks must start alike.
        with self._thread.paused():
            for candidate in self.buckets:
                if candidate.missing:
                    break
                if candidate.handle is None:
                    candidate.handle = candidate.sum.start()
            self._group.progress()
        self._thread.resume()

    def fold(self, stage: int) -> None:
        """With a fixed order: the gradients of `stage` are one microbatch's; sum them with those before."""
        for bucket in self.buckets:
            if bucket.stage == stage:
                bucket.lay_all()
                bucket.fold()

    def reduce(self) -> None:
        """Sum the gradients over the axis, in place. Every rank of the axis calls it, after its backward
        passes.
        """
        self._lay_all()
        if self._thread is not None:
            self._thread.pause()
        for bucket in self.buckets if self.axis.size > 1 else ():
            if bucket.handle is None:
                if self.behind:
                    bucket.handle = bucket.sum.start()
                else:
                    bucket.sum.run()
        self._group.settle()
        for bucket in self.buckets:
            bucket.handle = None
            bucket.missing = len(bucket.parameters)
        self._last.clear()

    def _lay_all(self) -> None:
        """Give every parameter its gradient of all this rank's microbatches."""
        for parameter in self._loose:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self.buckets:
            if self.fixed_order:
                bucket.unfold()
            bucket.lay_all()

    def norm(
        self, comm: "MPI.Intracomm | None" = None, twins: Collection[nn.Parameter] = ()
    ) -> float:
        """The 2-norm of all gradients over `comm` (None: the axis), in float64, the same on every rank.

        The ranks of an axis share the work. Squares are summed in pieces of one parameter each, and the pieces' sums in
        exact arithmetic, so the layout leaves no trace. `twins`: parameters that are counted on another rank, or
        elsewhere on this one. Every rank of `comm` calls it, after `reduce`.
        """
        gradients = [
            pair
            for bucket in self.buckets
            for pair in zip(bucket.parameters, bucket.views, strict=True)
        ]
        gradients += [
            (parameter, parameter.grad) for parameter in self._loose if parameter.grad is not None
        ]
        pieces = norm_pieces(gradients, twins)
        first, stop = (
            len(pieces) * part // self.axis.size for part in (self.axis.rank, self.axis.rank + 1)
        )
        own = [square_sum(piece) for piece in pieces[first:stop]]
        gathered = (comm or self.axis.comm).allgather(own)
        return math.sqrt(math.fsum(square for part in gathered for square in part))

    def clip_(
        self,
        max_norm: float,
        comm: "MPI.Intracomm | None" = None,
        twins: Collection[nn.Parameter] = (),
    ) -> float:
        """Scale all gradients so that their norm is `max_norm` at most; return the norm that they had. As `norm`."""
        norm = self.norm(comm, twins)
        if math.isfinite(norm) and norm > max_norm:
            for bucket in self.buckets:
                bucket.flat.mul_(max_norm / norm)
            for parameter in self._loose:
                assert parameter.grad is not None
                parameter.grad.mul_(max_norm / norm)
        return norm


@dataclass(frozen=True, eq=False)
class _Hook:
    """What autograd calls when a parameter's gradient is there, or has been added to."""

    buckets: GradientBuckets
    bucket: Bucket
    view: Tensor

    def __call__(self, parameter: nn.Parameter) -> None:
        lay(parameter, self.view)
        self.buckets.completed(self.bucket)
