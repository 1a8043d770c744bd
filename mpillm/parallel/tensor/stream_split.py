"""How the stream between the cut products is shared out to the ranks: plain numbers, without torch.

Sequence parallelism (Korthikanti et al. 2022, "Reducing activation recomputation"): norms, dropout
and residual sums are computed by each rank for its own tokens.
"""

from typing import NamedTuple

from mpillm.comm.algorithms.schedule import block_bounds

ROWS, POSITIONS = 0, 1


class StreamSplit(NamedTuple):
    """The parts of a stream (B, T, C): along `dim`, ROWS or POSITIONS, part r from `bounds[r]`."""

    dim: int
    bounds: tuple[int, ...]
    rows: int
    length: int

    @property
    def size(self) -> int:
        """The number of parts."""
        return len(self.bounds) - 1

    def first(self, rank: int) -> int:
        """Return where the part of `rank` begins along `dim`."""
        return self.bounds[rank]

    def count(self, rank: int) -> int:
        """Return the rows, or positions, of the part of `rank`."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def shape(self, rank: int) -> tuple[int, int]:
        """Return (rows, positions) of the part of `rank`."""
        count = self.count(rank)
        return (count, self.length) if self.dim == ROWS else (self.rows, count)

    @property
    def most_tokens(self) -> int:
        """The tokens of the largest part."""
        return max(rows * length for rows, length in map(self.shape, range(self.size)))


def choose_split(rows: int, length: int, size: int) -> StreamSplit:
    """Share `rows` sequences of `length` tokens out to `size` ranks: by rows where these divide,
    else by positions, in parts that differ by one position at most.

    Parts of whole rows are contiguous memory.
    """
    dim = POSITIONS if rows % size else ROWS
    bounds = block_bounds((rows, length)[dim], size)
    return StreamSplit(dim, tuple(bounds), rows, length)
