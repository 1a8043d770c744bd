"""Which positions of a sequence a rank holds: zig-zag, so that causal attention is even work.

A sequence is cut into 2 · p chunks; rank r holds chunks r and 2p − 1 − r (Brandon et al. 2023,
"Striped attention", and the zig-zag order of ring-flash-attention). Pure functions, without torch
and MPI. Lengths that 2p does not divide give chunks whose lengths differ by one, or empty ones.
"""

from typing import Any

import numpy as np

Range = tuple[int, int]
"""The first position, and the one after the last."""
Int64s = np.ndarray[Any, np.dtype[np.int64]]


def chunk_span(chunk: int, ranks: int, length: int) -> Range:
    """Return the positions of a chunk, from 0 to 2 · `ranks` − 1, of a sequence of `length`."""
    chunks = 2 * ranks
    return length * chunk // chunks, length * (chunk + 1) // chunks


def own_spans(rank: int, ranks: int, length: int) -> tuple[Range, Range]:
    """Return the positions of a rank's two chunks, in the order in which it holds them."""
    return chunk_span(rank, ranks, length), chunk_span(2 * ranks - 1 - rank, ranks, length)


def own_length(rank: int, ranks: int, length: int) -> int:
    """Return how many positions of a sequence a rank holds."""
    return sum(stop - first for first, stop in own_spans(rank, ranks, length))


def longest_length(ranks: int, length: int) -> int:
    """Return the most positions that a rank holds."""
    return max(own_length(rank, ranks, length) for rank in range(ranks))


def own_positions(rank: int, ranks: int, length: int) -> Int64s:
    """Return the positions that a rank holds, in its order."""
    return np.concatenate([np.arange(*span) for span in own_spans(rank, ranks, length)])
