"""Gather and reduce a stream by messages: where ranks are on several nodes, or on GPUs."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpillm.comm.communicator import Communicator
from mpillm.comm.persistent import PersistentCollective
from mpillm.parallel.tensor.stream_split import StreamSplit

# Shapes whose messages are kept: two in training, at each width. An evaluation has many more.
MOST_SHAPES = 8


class _Prepared(NamedTuple):
    """Memory for a part of each rank, all as long as the longest, and the prepared calls."""

    parts: Tensor
    """(ranks, elements)."""
    own: Tensor
    gather: PersistentCollective
    reduce: PersistentCollective


class MessageStreams:
    """Streams of any size, by all-gathers and reduce-scatters of `group`, prepared once for each of
    the last shapes.
    """

    def __init__(self, group: Communicator) -> None:
        self._group = group
        self._prepared: dict[tuple[StreamSplit, int, torch.dtype], _Prepared] = {}

    def gather(self, own: Tensor, split: StreamSplit) -> Tensor:
        """Return the whole stream (B, T, C) of all parts."""
        width = own.shape[-1]
        prepared = self._prepare(split, width, own)
        prepared.own[: own.numel()].copy_(own.reshape(-1))
        prepared.gather.run()
        parts = [
            part[: rows * length * width].view(rows, length, width)
            for part, (rows, length) in zip(prepared.parts, self._shapes(split), strict=True)
        ]
        return torch.cat(parts, split.dim)

    def reduce(self, partial: Tensor, split: StreamSplit) -> Tensor:
        """Return the own part of the sum over the ranks of `partial` (B, T, C)."""
        width, rank = partial.shape[-1], self._group.rank
        prepared = self._prepare(split, width, partial)
        for other, part in enumerate(prepared.parts):
            given = partial.narrow(split.dim, split.first(other), split.count(other))
            part[: given.numel()].copy_(given.reshape(-1))
        prepared.reduce.run()
        rows, length = split.shape(rank)
        return prepared.own[: rows * length * width].view(rows, length, width).clone()

    def _shapes(self, split: StreamSplit) -> list[tuple[int, int]]:
        return [split.shape(rank) for rank in range(split.size)]

    def _prepare(self, split: StreamSplit, width: int, like: Tensor) -> _Prepared:
        key = split, width, like.dtype
        if key not in self._prepared:
            if len(self._prepared) == MOST_SHAPES:
                # All ranks see the same shapes in the same order, and no call is in flight.
                self._prepared.clear()
            count = split.most_tokens * width
            # The first use may be an evaluation, whose tensors no later step could write.
            with torch.inference_mode(False):
                # Zeros: what follows a shorter part is summed too, and could be no number.
                parts = torch.zeros((split.size, count), dtype=like.dtype, device=like.device)
                own = torch.zeros(count, dtype=like.dtype, device=like.device)
            self._prepared[key] = _Prepared(
                parts,
                own,
                self._group.prepare("allgather", own, parts),
                self._group.prepare("reduce_scatter", parts, own),
            )
        return self._prepared[key]

    def close(self) -> None:
        """Free the memory, and what was prepared for it."""
        self._prepared.clear()
