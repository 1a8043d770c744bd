"""A rank's share of a model along the tensor axis: cut parts, their stream, shared gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.persistent import PersistentCollective
from mpillm.comm.selection import Profile
from mpillm.models.part_module import PartModule, Streams
from mpillm.parallel.pipeline.stage import PipelineStage
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.tensor.cut_part import cut_part
from mpillm.parallel.tensor.stream import TensorStream
from mpillm.parallel.tensor.stream_split import choose_split
from mpillm.parallel.tensor.vocabulary_shard import ShardExchange
from mpillm.parallel.tensor.weight_cuts import WeightCut

RowsLength = Callable[[int], tuple[int, int]]
"""The sequences of a microbatch, and their tokens."""


class TensorParallel:
    """The tensor axis of one rank. Every rank of `axis` makes it, and they call it together."""

    def __init__(
        self,
        axis: Axis,
        settings: ParallelSettings,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.axis = axis
        self._group = Communicator(
            axis.comm, profile=profile, debug=settings.debug, warn=warn, node_map=axis.node_map
        )
        self.stream = TensorStream(axis, self._group, warn)
        self._shards = ShardExchange(self._group)
        self.cuts: dict[str, WeightCut] = {}
        """The cut weights by their names in the whole model."""
        self._replicated: list[nn.Parameter] = []
        self._flat: Tensor | None = None
        self._sum: PersistentCollective | None = None

    def cut(self, part: PartModule) -> None:
        """Cut a part whose weights have no values yet: what is cut away is never touched."""
        cuts = cut_part(part, self.stream, self._shards)
        self.cuts |= cuts
        self._replicated += [weight for name, weight in part.named_weights() if name not in cuts]

    @property
    def counted_elsewhere(self) -> list[nn.Parameter]:
        """The weights that each rank has whole, but on rank 0: a norm counts them there."""
        return self._replicated if self.axis.rank else []

    def sum_replicated(self, gradient_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Sum the gradients of weights that are not cut: each rank has those of its own tokens and
        heads.

        Every rank calls it, after the sums over microbatches and data.
        """
        gradients = [gradient_of(weight) for weight in self._replicated if weight.requires_grad]
        if not gradients:
            return
        if self._flat is None:
            count = sum(gradient.numel() for gradient in gradients)
            first = gradients[0]
            self._flat = torch.empty(count, dtype=first.dtype, device=first.device)
            self._sum = self._group.prepare("allreduce", self._flat)
        assert self._sum is not None
        views = torch.split(self._flat, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(list(views), [gradient.reshape(-1) for gradient in gradients])
        self._sum.run()
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(views))

    def own_shape(self, rows: int, length: int) -> tuple[int, int]:
        """Return the rows and positions that this rank has of a stream."""
        return choose_split(rows, length, self.axis.size).shape(self.axis.rank)

    def entered(
        self, stages: Mapping[int, PipelineStage], shape_of: RowsLength, room: int
    ) -> dict[int, PipelineStage]:
        """Return the stages with the stream entered ahead of each pass. `room`: see `enter`."""
        return {
            number: _EnteredStage(stage, self.stream, shape_of, room)
            for number, stage in stages.items()
        }

    def close(self) -> None:
        """Free shared memory and communicators."""
        self.stream.close()
        self._sum = None
        self._group.free()


@dataclass(frozen=True)
class _EnteredStage:
    """A stage whose passes begin by entering the stream: the recomputation of a layer within a
    backward pass shares it out as the forward pass did.
    """

    stage: PipelineStage
    stream: TensorStream
    shape_of: RowsLength
    room: int

    def _enter(self, microbatch: int) -> None:
        self.stream.enter(*self.shape_of(microbatch), self.room)

    def forward(self, microbatch: int, streams: Streams) -> Streams:
        self._enter(microbatch)
        return self.stage.forward(microbatch, streams)

    def backward(self, microbatch: int, gradients: Streams) -> Streams:
        self._enter(microbatch)
        return self.stage.backward(microbatch, gradients)

    def backward_input(self, microbatch: int, gradients: Streams) -> Streams:
        self._enter(microbatch)
        return self.stage.backward_input(microbatch, gradients)

    def backward_weight(self, microbatch: int) -> None:
        self._enter(microbatch)
        self.stage.backward_weight(microbatch)
