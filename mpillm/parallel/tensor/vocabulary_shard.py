"""The exchanges of a head whose vocabulary the ranks share: largest values, sums, whole logits."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpillm.comm.communicator import Communicator
from mpillm.comm.persistent import PersistentCollective
from mpillm.models.linear_head import VocabularyShard
from mpillm.parallel.tensor.weight_cuts import WeightCut, column_bounds


class ShardExchange:
    """The exchanges of the ranks of `group`, which call them together, in one order."""

    def __init__(self, group: Communicator) -> None:
        self._group = group
        self._prepared: dict[tuple[Any, ...], tuple[Tensor, PersistentCollective]] = {}

    def shard(self, cut: WeightCut) -> VocabularyShard:
        """Return the shard of a head's weight that is cut by tokens."""
        bounds = column_bounds(cut.shape[0], self._group.size)
        counts = [stop - first for first, stop in pairwise(bounds)]

        def join(logits: Tensor) -> Tensor:
            joined: Tensor = _Joined.apply(logits, self._group, counts)  # type: ignore[no-untyped-call]
            return joined

        most = max(counts)
        return VocabularyShard(
            cut.first, cut.shape[0], most, self._by("max"), self._by("sum"), join
        )

    def _by(self, op: str) -> Callable[[Tensor], None]:
        return lambda values: self._reduce(values, op)

    def _reduce(self, values: Tensor, op: str) -> None:
        """Replace `values` by their reduction over the ranks."""
        key = op, values.shape, values.dtype
        if key not in self._prepared:
            # The first use may be an evaluation, whose tensors no later step could write.
            with torch.inference_mode(False):
                buffer = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
            self._prepared[key] = buffer, self._group.prepare("allreduce", buffer, op=op)
        buffer, prepared = self._prepared[key]
        buffer.copy_(values)
        prepared.run()
        values.copy_(buffer)


class _Joined(torch.autograd.Function):
    """Gather logits (…, v) of all ranks along the vocabulary.

    All ranks compute the same from them, so each takes its own part of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Communicator, counts: list[int]) -> Tensor:
        ctx.counts, ctx.rank = counts, group.rank
        own = logits.new_zeros((*logits.shape[:-1], max(counts)))
        own[..., : logits.shape[-1]] = logits
        every = own.new_empty((group.size, *own.shape))
        group.allgather(own, every)
        return torch.cat([each[..., :n] for each, n in zip(every, counts, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.split(gradient, ctx.counts, -1)[ctx.rank], None, None
