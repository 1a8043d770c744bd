"""Replicated gradients: all-reduce of a few buckets over all microbatches and data ranks.

Sums are never divided. The caller scales the loss of each microbatch by 1 / (targets of the global
batch), so the sum over microbatches and ranks is the mean over all targets, however unequal the
shares.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext

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
    make_bucket,
    norm_pieces,
    padded,
    summed_dtype,
)
from mpillm.parallel.data.gradient_sync import Gradients, GradientSync
from mpillm.parallel.data.master_weights import MasterWeights
from mpillm.parallel.settings import ParallelSettings

# Overlapped: small buckets, so that the first all-reduce starts early. Not overlapped: few large
# ones.
OVERLAPPED_BYTES, AFTER_BYTES = 4 << 20, 32 << 20


class ReplicatedGradients(GradientSync):
    """The gradients of `parts`, a rank's parts of the model, in buckets in the order of the
    backward pass.

    Tied parameters count once, frozen ones not at all; gradients may have any float types. Every
    rank of `axis` makes it, with the same parameters in the same order; differing ones raise
    CommError. After `finish` each parameter's `grad` is a view into a bucket; one that no backward
    pass reached is zero. Where parameters have a lower dtype than float32, only the gradients of
    their masters are filled. On an axis of one rank there is nothing to sum and there are no
    buckets for float32, unless `flat`: gradients stay where autograd put them.
    """

    def __init__(
        self,
        parts: Sequence[Iterable[nn.Parameter]],
        axis: Axis,
        settings: ParallelSettings,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
        *,
        fixed_order: bool = False,
        flat: bool = False,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`profile`: the cluster's, which chooses algorithms. `warn` receives each fallback in
        words. `reduce_dtype`: of the sums over ranks. `flat`: use buckets on one rank too.

        `fixed_order`: sum in the one tree over all microbatches of all ranks, in rank order
        (algorithms/trees.py). Then each part has a power of two of microbatches on more than one
        rank, and takes them in ascending order.
        """
        self.axis, self.fixed_order = axis, fixed_order
        self._group = Communicator(
            axis.comm,
            profile=profile,
            debug=settings.debug,
            warn=warn,
            node_map=axis.node_map,
        )
        # The last part first: its backward pass comes first.
        trained = [list(dict.fromkeys(p for p in part if p.requires_grad)) for part in parts]
        gpu = next((p.device for parameters in trained for p in parameters if p.is_cuda), None)
        on_gpu = gpu is not None
        wanted = axis.size > 1 and not fixed_order
        self.overlaps = wanted and self._wants_overlap(settings.overlap, on_gpu)
        early = self.overlaps and not on_gpu
        nbytes = settings.bucket_bytes or (OVERLAPPED_BYTES if early else AFTER_BYTES)
        groups = [
            (part, group)
            for part, parameters in reversed(list(enumerate(trained)))
            for group in group_parameters(parameters, nbytes)
        ]
        self._check_same_groups([group for _, group in groups])
        lower = any(summed_dtype(p.dtype) != p.dtype for parameters in trained for p in parameters)
        buckets_needed = axis.size > 1 or fixed_order or lower or flat
        self._loose = [] if buckets_needed else [p for parameters in trained for p in parameters]
        self._stream: torch.cuda.Stream | None = None
        if self.overlaps and on_gpu:
            self._stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
        self._thread = _start_thread(self._group, self._stream) if self.overlaps else None
        # Shared memory pays where ranks of the axis share a node.
        share = settings.allreduce in ("auto", "shared", "two-level") and axis.size > len(
            self._group.nodes
        )
        self.buckets = [
            make_bucket(
                group, self._group, settings.allreduce, share, part, fixed_order, reduce_dtype
            )
            for part, group in (groups if buckets_needed else ())
        ]
        for bucket in self.buckets:
            bucket.stream = self._stream
        self._parameters = [p for parameters in trained for p in parameters]
        self._masters: MasterWeights | None = None
        self._trained = trained
        # Where small batches are measured: what receives them, and the sums of earlier ones.
        self._small: Callable[[Gradients], None] | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        # Parts whose last microbatch has begun.
        self._last: set[int] = set()
        self._places: dict[nn.Parameter, tuple[Bucket, Tensor]] = {}
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                self._places[parameter] = bucket, view
                # After accumulation: `grad` then holds the sum of all uses in this microbatch.
                add_hook = parameter.register_post_accumulate_grad_hook
                add_hook(self.ready)  # type: ignore[no-untyped-call]

    def _wants_overlap(self, overlap: str, on_gpu: bool) -> bool:
        if overlap != "auto":
            return overlap == "during"
        from mpi4py import MPI

        # The progress thread calls MPI, and so does autograd's thread, which a GPU has of its own.
        threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        # Within a node a reduction of host memory costs less than the core that the progress thread
        # takes. GPUs leave the cores idle.
        return threads and (on_gpu or len(self._group.nodes) > 1)

    def _check_same_groups(self, groups: list[list[nn.Parameter]]) -> None:
        own = [(sum(map(padded, group)), str(group[0].dtype), len(group)) for group in groups]
        for rank, other in enumerate(self.axis.comm.allgather(own)):
            if other != own:
                raise CommError(
                    "gradients can be summed only where all ranks train the same parameters: "
                    f"rank {self.axis.rank} has buckets {own}, rank {rank} has {other}; give every "
                    "rank the same model and settings"
                )

    def describe(self) -> str:
        count, when = len(self.buckets), "during" if self.overlaps else "after"
        algorithms = " and ".join(dict.fromkeys(bucket.sum.algorithm for bucket in self.buckets))
        lower = {str(bucket.wire.dtype) for bucket in self.buckets if bucket.wire is not None}
        dtypes = "".join(f", in {name.removeprefix('torch.')}" for name in sorted(lower))
        return (
            f"{count} bucket{'s' * (count != 1)} by {algorithms}, {when} the backward pass{dtypes}"
        )

    def begin(self, small: Callable[[Gradients], None] | None = None) -> None:
        self._small = small
        # Gradients are dropped, not zeroed: autograd then leaves its first gradient as it is, and
        # one copy lays it into the bucket. That reads and writes less than clearing the bucket and
        # adding to it.
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self.buckets:
            bucket.filled.clear()

    def last_microbatch(self, part: int | None = None) -> None:
        self._last |= {bucket.part for bucket in self.buckets} if part is None else {part}

    def ready(self, parameter: nn.Parameter) -> None:
        """Take the gradient into its bucket; on the last microbatch start every bucket that is
        complete.
        """
        bucket, view = self._places[parameter]
        bucket.take(parameter, view)
        if bucket.part not in self._last:
            return
        bucket.missing -= 1
        # A sum in flight would change what is measured: then all start in `finish`.
        if self._thread is None or self._small is not None:
            return
        # In bucket order, whatever the order of this rank's graph: all ranks must start them alike.
        with self._thread.paused():
            for candidate in self.buckets:
                if candidate.missing:
                    break
                if candidate.handle is None:
                    candidate.start_sum()
            # In the stream of the sums: where one ends, the current stream waits for its copies,
            # and the backward pass must not.
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._group.progress()
        self._thread.resume()

    def microbatch_ended(self, part: int) -> None:
        """With a fixed order: add this microbatch's gradients of `part` to the tree of sums."""
        alone = self._small if self.axis.size == 1 else None
        if not self.fixed_order and alone is None:
            return
        for bucket in self.buckets:
            if bucket.part == part:
                bucket.take_all()
                if alone is not None:
                    alone(bucket.gradients())
                if self.fixed_order:
                    bucket.fold()
                else:
                    self._set_aside([(p, view.clone()) for p, view in bucket.gradients()])
                    bucket.forget()
        if alone is not None and not self.buckets:
            found = [(p, p.grad) for p in self._trained[part] if p.grad is not None]
            alone(found)
            self._set_aside(found)
            for parameter, _ in found:
                parameter.grad = None

    def _set_aside(self, gradients: Gradients) -> None:
        """Add the gradients of a microbatch that was measured, in the order of autograd's own sums:
        measuring changes no bit.
        """
        for parameter, gradient in gradients:
            total = self._sums.get(parameter)
            self._sums[parameter] = gradient if total is None else total.add_(gradient)

    def finish(self) -> None:
        self._complete()
        if self._thread is not None:
            self._thread.pause()
        for bucket in self.buckets if self.axis.size > 1 else ():
            if bucket.handle is None:
                if self.overlaps:
                    bucket.start_sum()
                else:
                    bucket.run_sum()
        self._group.wait_all()
        for bucket in self.buckets:
            bucket.end_step()
        self._last.clear()

    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        if parameter in self._places:
            return self._places[parameter][1]
        assert parameter.grad is not None
        return parameter.grad

    def optimizer_weights(
        self,
        weights: Mapping[str, nn.Parameter],
        values: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> Mapping[str, nn.Parameter]:
        if not values:
            return weights
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        self._masters = MasterWeights(trained, values, self.gradient_of)
        return {**weights, **self._masters.parameters}

    def updated(self) -> None:
        if self._masters is not None:
            self._masters.round()

    def _complete(self) -> None:
        """Complete the gradients of this rank, ahead of the sums over the axis."""
        for parameter, total in self._sums.items():
            if parameter in self._places:
                bucket, view = self._places[parameter]
                view.copy_(total)
                bucket.filled.add(parameter)
                if not bucket.adds:
                    parameter.grad = view
            else:
                parameter.grad = total
        self._sums.clear()
        for parameter in self._loose:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in self.buckets:
            if self.fixed_order:
                bucket.unfold()
            bucket.take_all()
        if self._small is not None and self.axis.size > 1:
            self._small(pair for bucket in self.buckets for pair in bucket.gradients())

    def counted_gradients(
        self, replica: tuple[int, int], excluded: Collection[nn.Parameter] = ()
    ) -> list[Tensor]:
        gradients = [pair for bucket in self.buckets for pair in bucket.gradients()]
        gradients += [(p, p.grad) for p in self._loose if p.grad is not None]
        pieces = norm_pieces(gradients, excluded)
        # All replicas hold the same sums, so each squares a share of them.
        rank, ranks = replica
        return pieces[len(pieces) * rank // ranks : len(pieces) * (rank + 1) // ranks]

    def scale_(self, factor: float) -> None:
        for bucket in self.buckets:
            bucket.flat.mul_(factor)
        for parameter in self._loose:
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    def clamp_(self, limit: float) -> None:
        for bucket in self.buckets:
            bucket.flat.clamp_(-limit, limit)
        for parameter in self._loose:
            assert parameter.grad is not None
            parameter.grad.clamp_(-limit, limit)

    def close(self) -> None:
        self.begin()
        for bucket in self.buckets:
            bucket.views.clear()
            bucket.flat = torch.empty(0)
            if bucket.shared is not None:
                bucket.shared.free()
        self.buckets, self._places, self._masters = [], {}, None
        if self._thread is not None:
            self._thread.end()
        self._group.free()


def _start_thread(group: Communicator, stream: "torch.cuda.Stream | None") -> ProgressThread:
    """Start the thread that progresses sums, on the GPU and in the stream of the sums.

    A new thread has GPU 0 and its default stream. There it would take memory for a context, and
    let the backward pass wait for the sums.
    """
    begin = functools.partial(torch.cuda.set_stream, stream) if stream else None
    return ProgressThread(group, begin)
