"""Gather and reduce a stream in the memory that a node's ranks share.

A gathered stream is written once: each rank writes its part, and after a barrier all multiply from
the same memory, in the backward pass too. A reduction takes one row a rank: each writes its partial
sums, and after a barrier adds up its own part of all rows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.parallel.tensor.slots import SlotPool
from mpillm.parallel.tensor.stream_split import StreamSplit

if TYPE_CHECKING:
    from mpi4py import MPI

# NumPy lacks bfloat16: an array of integers of the same size carries it.
CARRIERS = {2: np.int16, 4: np.float32, 8: np.float64}


class SharedStreams:
    """Streams of at most `nbytes`. Every rank of `comm`, all of one node, makes it by `create`."""

    def __init__(
        self,
        comm: "MPI.Intracomm",
        slots: SlotPool,
        rows: tuple[SharedSegment, SharedSegment],
        barrier: Callable[[], object],
    ) -> None:
        """See `create`."""
        self._rank, self.slots, self._rows, self._barrier = comm.rank, slots, rows, barrier
        self.nbytes = len(rows[0].own)

    @classmethod
    def create(
        cls, comm: "MPI.Intracomm", nbytes: int, barrier: Callable[[], object]
    ) -> "SharedStreams | str":
        """Map the memory; return on every rank why that failed. `barrier`: of the ranks of `comm`,
        after which each sees what the others wrote before.
        """
        # Whole elements of any type.
        nbytes = -(-nbytes // 8) * 8
        slots = SlotPool.create(comm, nbytes)
        if isinstance(slots, str):
            return slots
        one, other = (share_segment(comm, nbytes) for _ in range(2))
        if isinstance(one, str):
            return one
        return other if isinstance(other, str) else cls(comm, slots, (one, other), barrier)

    def gather(self, own: Tensor, split: StreamSplit) -> Tensor | None:
        """Return the whole stream (B, T, C) of all parts; None on every rank without room.

        Nobody writes into it while a tensor of any rank shares its memory.
        """
        taken = self.slots.take(CARRIERS[own.element_size()])
        if taken is not None:
            shape = (split.rows, split.length, own.shape[-1])
            # The tensor keeps the array itself, whose end frees the slot.
            whole = _shaped(torch.from_numpy(taken), shape, own.dtype)
            _part(whole, split, self._rank).copy_(own)
        self.slots.name_next()
        self._barrier()
        return None if taken is None else whole

    def reduce(self, partial: Tensor, split: StreamSplit) -> Tensor:
        """Return the own part of the sum over the ranks of `partial` (B, T, C)."""
        # Two in turns: the barrier of the next reduction, which uses the other one, comes after
        # all reads of this one.
        segment, self._rows = self._rows[0], self._rows[::-1]
        shape, carrier = partial.shape, CARRIERS[partial.element_size()]
        rows = [
            _shaped(torch.from_numpy(row.view(carrier)), shape, partial.dtype)
            for row in segment.rows
        ]
        rows[self._rank].copy_(partial)
        self._barrier()
        return _sum([_part(row, split, self._rank) for row in rows])


def _shaped(flat: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape))
    return flat.view(dtype)[:count].view(shape)


def _part(whole: Tensor, split: StreamSplit, rank: int) -> Tensor:
    return whole.narrow(split.dim, split.first(rank), split.count(rank))


def _sum(parts: list[Tensor]) -> Tensor:
    """Add the parts in the order of ranks: 16 bits in float32, rounded once."""
    dtype = parts[0].dtype
    if len(parts) > 2 and dtype.itemsize < torch.float32.itemsize:
        parts = [part.float() for part in parts]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(dtype)
