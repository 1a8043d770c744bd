"""Data parallel: every rank holds the whole model and a share of the batch; gradients are summed over the
ranks.

Sums are never divided: who calls scales the loss of each microbatch by 1 / (tokens of the global batch), and
the sum over microbatches and ranks is the mean over all tokens, however unequal the shares.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Literal

import numpy as np
import torch
import xxhash
from annotated_types import Ge
from torch import Tensor, nn

from mpillm.comm.buffers import as_buffer
from mpillm.comm.choice import Profile
from mpillm.comm.group import Group, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.progress import ProgressThread
from mpillm.comm.transfers import block_bounds
from mpillm.errors import CommError, LayoutError
from mpillm.parallel.buckets import Bucket, group_parameters, lay, make_bucket, padded, square_sum

BCAST_PIECE_BYTES = 2**30
# Measured in docs/notes.md: how long the thread that moves messages behind the backward pass sleeps between two looks.
PROGRESS_SECONDS = 1e-3
# Behind the backward pass the first bucket should set out early; after it few, long ones are best.
BEHIND_BYTES, AFTER_BYTES = 4 << 20, 32 << 20


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks share a training step."""

    data: Annotated[int, Ge(0)] = 0
    """Ranks that share the batch; 0: all of them."""
    allreduce: Literal[
        "auto",
        "shared",
        "two-level",
        "ring",
        "segmented-ring",
        "recursive-doubling",
        "rabenseifner",
        "binomial",
        "native",
    ] = "auto"
    """Who sums the gradients: the ranks of a node in memory that they share, one of our lists of messages, or the MPI
    library; auto: whichever is fastest by the cluster's profile, or by what was measured elsewhere.
    """
    overlap: Literal["auto", "after", "behind"] = "auto"
    """Reduce after the backward pass, or behind it while it runs; auto: after on one node, behind over a
    network.
    """
    bucket_bytes: Annotated[int, Ge(0)] = 0
    """Gradients travel in messages of about this size; 0: 32 MiB after the backward pass, 4 MiB behind it."""
    profile: str = ""
    """The cluster profile that `mpillm bench … --save` wrote; empty: `cluster.json` in the run's folder, if there is
    one.
    """
    debug: bool = False
    """Compare the ranks' collective calls before data moves."""


class GradientBuckets:
    """The gradients of `parameters` (tied ones once, frozen ones not at all), of any float types, on the CPU.

    Every rank of `axis` makes it, with the same parameters in the same order; differing ones raise CommError.
    After `reduce` each parameter's `grad` is a view into a bucket; one that no backward pass reached is zero.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], axis: Axis, settings: ParallelSettings,
        profile: Profile | None = None, warn: Callable[[str], None] = silent,
    ) -> None:  # fmt: skip
        """`profile`: the cluster's, which chooses algorithms; `warn` is told what had to be done without."""
        self.axis, self.settings = axis, settings
        trained = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self._group = Group(axis.comm, profile=profile, debug=settings.debug, warn=warn)
        self.behind = axis.size > 1 and self._overlaps()
        groups = group_parameters(trained, settings.bucket_bytes or (BEHIND_BYTES if self.behind else AFTER_BYTES))
        self._check_layout(groups)
        self._thread = ProgressThread(self._group, PROGRESS_SECONDS) if self.behind else None
        share = settings.allreduce in ("auto", "shared", "two-level") and axis.size > len(self._group.nodes)
        self.buckets = [make_bucket(group, self._group, settings.allreduce, share) for group in groups]
        self._last = False
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                hook = _Hook(self, bucket, view)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _overlaps(self) -> bool:
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
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.grad = None
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
            for parameter in bucket.parameters:
                parameter.grad = None

    def begin_last_microbatch(self) -> None:
        """Call ahead of a step's last backward pass: behind it, complete buckets start on their way."""
        self._last = True
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def completed(self, bucket: Bucket) -> None:
        """One more gradient of `bucket` is final: start what is complete, and make the library move."""
        if not self._last:
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

    def reduce(self) -> None:
        """Sum the gradients over the axis, in place. Every rank of the axis calls it, after its backward
        passes.
        """
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                lay(parameter, view)
        if self._thread is not None:
            self._thread.pause()
        for bucket in self.buckets if self.axis.size > 1 else ():
            if bucket.handle is None:
                if self.behind:
                    bucket.handle = bucket.sum.start()
                else:
                    bucket.sum.run()
        for bucket in self.buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None
        self._last = False

    def norm(self) -> float:
        """The 2-norm of all gradients, in float64, the same on every rank; each reads its own part of the buckets.

        Every rank of the axis calls it, after `reduce`, when all hold the same.
        """
        own = 0.0
        for bucket in self.buckets:
            first, stop = block_bounds(bucket.flat.numel(), self.axis.size)[self.axis.rank : self.axis.rank + 2]
            own += square_sum(bucket.flat[first:stop])
        parts = np.empty(self.axis.size)
        self.axis.comm.Allgather(np.array([own]), parts)
        return math.sqrt(math.fsum(parts))

    def clip_(self, max_norm: float) -> float:
        """Scale all gradients so that their norm is `max_norm` at most; return the norm that they had.

        Every rank of the axis calls it.
        """
        norm = self.norm()
        if math.isfinite(norm) and norm > max_norm:
            for bucket in self.buckets:
                bucket.flat.mul_(max_norm / norm)
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


def share_batch(global_batch: int, axis: Axis) -> tuple[int, int]:
    """(first, count): which sequences of the global batch are this rank's. Equal shares, in rank order.

    Raises LayoutError, on every rank, when the ranks do not divide the batch.
    """
    share, rest = divmod(global_batch, axis.size)
    if rest or share < 1:
        below, above = share * axis.size, (share + 1) * axis.size
        batches = f"{below} or {above}" if below > 0 else f"{above}"
        ranks = max((n for n in range(1, axis.size) if global_batch > 0 and global_batch % n == 0), default=0)
        raise LayoutError(
            f"a global batch of {global_batch} sequences cannot be shared by {axis.size} ranks; use {batches}"
            + (f", or {ranks} rank{'s' * (ranks > 1)} along {axis.name}" if ranks else "")
        )
    return axis.rank * share, share


def broadcast_parameters(parameters: Iterable[Tensor], axis: Axis, root: int = 0) -> None:
    """Overwrite `parameters` (contiguous, on the CPU) by those of rank `root`, bit by bit.

    Every rank of the axis calls it, with the same shapes in the same order.
    """
    for parameter in parameters:
        octets = as_buffer(parameter).octets
        for first in range(0, octets.size, BCAST_PIECE_BYTES):
            axis.comm.Bcast(octets[first : first + BCAST_PIECE_BYTES], root)


def check_same(parameters: Iterable[Tensor], axis: Axis) -> None:
    """Prove that all ranks hold bitwise the same `parameters`, by comparing digests (XXH3, 128 bits).

    Every rank of the axis calls it. Where they differ, all raise CommError with the ranks that stand apart
    from the most and the first parameter that differs.
    """
    digests = [_digest(parameter) for parameter in parameters]
    total = xxhash.xxh3_128_hexdigest(repr(digests).encode())
    if len(set(axis.comm.allgather(total))) == 1:
        return
    index, apart = first_difference(axis.comm.allgather(digests))
    raise CommError(
        f"the ranks along {axis.name} must hold the same weights, but {', '.join(f'rank {rank}' for rank in apart)} of "
        f"{axis.size} stands apart, first in parameter {index} of {len(digests)}; start all ranks from one seed or "
        "checkpoint"
    )


def first_difference(everywhere: list[list[str]]) -> tuple[int, list[int]]:
    """Of each rank's digests: where they first differ, and the ranks apart from the majority (a tie: from
    rank 0).
    """
    for index, found in enumerate(zip_longest(*everywhere)):
        usual = Counter(found).most_common(1)[0][0]
        if apart := [rank for rank, digest in enumerate(found) if digest != usual]:
            return index, apart
    raise AssertionError("called with equal digests")


def _digest(parameter: Tensor) -> str:
    return f"{tuple(parameter.shape)} {xxhash.xxh3_128_hexdigest(as_buffer(parameter).octets.data)}"
