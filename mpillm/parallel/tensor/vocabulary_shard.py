"""The exchanges of a head whose vocabulary the ranks share: largest values, sums, whole logits."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mpillm.comm.communicator import Communicator
from mpillm.comm.persistent import PersistentCollective
from mpillm.models.linear_head import VocabularyShard
from mpillm.parallel.exchanged import exchanged
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

        def own(gradient: Tensor) -> Tensor:
            # All ranks compute the same from the joined logits: each takes its own part.
            return torch.split(gradient, counts, -1)[self._group.rank]

        def join(logits: Tensor) -> Tensor:
            return exchanged(logits, lambda given: self._join(given, counts), own)

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

    def _join(self, logits: Tensor, counts: list[int]) -> Tensor:
        """Gather logits (…, v) of all ranks along the vocabulary."""
        own = logits.new_zeros((*logits.shape[:-1], max(counts)))
        own[..., : logits.shape[-1]] = logits
        every = own.new_empty((self._group.size, *own.shape))
        self._group.allgather(own, every)
        return torch.cat([each[..., :n] for each, n in zip(every, counts, strict=True)], -1)
