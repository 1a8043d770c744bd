"""Windows of tokens: planned many at a time, then read by one system call each, straight into a batch's rows.

B windows of T tokens: `tokens_BT`.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.tokens.reader import TokenReader

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Windows:
    """`tokens_BT`, u2 or u4, and where documents end in each row.

    Row b's ends are `ends[splits[b] : splits[b + 1]]` (int32, ascending, each in [1, T - 1]): the token at an end is
    the first one of the next document. `starts` are the rows' first tokens, numbered in the split.
    """

    tokens_BT: Array
    ends: Array
    splits: Int64s
    starts: Int64s

    def ends_of(self, row: int) -> Array:
        return self.ends[self.splits[row] : self.splits[row + 1]]

    def fields(self, documents: bool) -> dict[str, Array]:
        """Return the raw arrays of a batch: `tokens` (B, T) and, with `documents`, each position's document number.

        Documents are numbered from 0 in each row: int64 (B, T).
        """
        raw = {"tokens": self.tokens_BT}
        if documents:
            begins = np.zeros(self.tokens_BT.shape, np.int64)
            for row in range(len(begins)):
                begins[row, self.ends_of(row)] = 1
            raw["documents"] = begins.cumsum(1)
        return raw


class ReadPlan:
    """Where windows of `length` tokens lie: files, byte offsets, and the document ends inside."""

    def __init__(
        self, reader: TokenReader, starts: Int64s, length: int, boundaries: bool = True
    ) -> None:
        """`starts` int64 (n,), each in [0, n_tokens - length]."""
        self.reader, self.starts, self.length = reader, starts, length
        shards = reader.shards_of(starts)
        # Lists: a batch is read in a Python loop, and taking numbers out of arrays would cost as much as the loop.
        self.shards: list[int] = shards.tolist()
        self.offsets: list[int] = reader.offsets_of(starts, shards).tolist()
        # The descriptor of each window's file, once for the whole plan.
        self._files: list[int] = []
        self._opened = -1
        self.crossing: list[int] = np.flatnonzero(
            starts + length > reader.firsts[shards + 1]
        ).tolist()
        self.ends, self.splits = (
            document_ends(reader, starts, length) if boundaries else _no_ends(len(starts))
        )

    def fetch(self, first: int, out: Array) -> None:
        """Fill the rows of `out` (B, length) with the windows `first` … `first` + B - 1. Raises DataError."""
        last, nbytes = first + len(out), self.length * self.reader.dtype.itemsize
        if self._opened != self.reader.times_closed:
            self._files, self._opened = (
                self.reader.descriptors(self.shards),
                self.reader.times_closed,
            )
        rows = self.reader.row_views(out)
        # The loop is map and sum, so that all of it but the calls runs in C.
        short = (
            sum(map(os.preadv, self._files[first:last], rows, self.offsets[first:last]))
            != len(out) * nbytes
        )
        # Read anew what one call couldn't: windows across two shards, and all when a read came short.
        across = self.crossing[bisect_left(self.crossing, first) : bisect_left(self.crossing, last)]
        for window in range(first, last) if short else across:
            self.reader.read(int(self.starts[window]), out[window - first])

    def windows(self, first: int, tokens_BT: Array) -> Windows:
        """The rows from `first` on, whose tokens were fetched into `tokens_BT`."""
        splits = self.splits[first : first + len(tokens_BT) + 1]
        ends = self.ends[splits[0] : splits[-1]]
        return Windows(
            tokens_BT, ends, splits - splits[0], self.starts[first : first + len(tokens_BT)]
        )

    def advise(self, first: int, count: int) -> None:
        """Ask the kernel to read windows ahead (POSIX_FADV_WILLNEED): cold random reads then overlap."""
        descriptors = self.reader.descriptors(self.shards[first : first + count])
        nbytes, advise = self.length * self.reader.dtype.itemsize, os.posix_fadvise
        for descriptor, offset in zip(
            descriptors, self.offsets[first : first + count], strict=True
        ):
            advise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def _no_ends(count: int) -> tuple[Array, Int64s]:
    return np.empty(0, np.int32), np.zeros(count + 1, np.int64)


def document_ends(reader: TokenReader, starts: Int64s, length: int) -> tuple[Array, Int64s]:
    """For each window the document ends e with start < e < start + length, less start: (flat int32, row splits int64).

    A window across shards is looked up in each of them: `piece` numbers the (window, shard) pairs, window-major, so
    that the pieces' ends in piece order are the flat array.
    """
    first_shards = reader.shards_of(starts)
    n_pieces = reader.shards_of(starts + (length - 1)) - first_shards + 1
    window = np.repeat(np.arange(len(starts)), n_pieces)
    shard = first_shards[window] + _count_up(n_pieces)
    local = starts[window] - reader.firsts[shard]
    # Sorted by place: shards come in groups, and neighbours find their pages in the cache.
    order = np.argsort(np.maximum(local, 0) + reader.firsts[shard])
    groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)
    lo, hi = np.empty_like(local), np.empty_like(local)
    for group in groups:
        ends = reader.doc_ends(int(shard[group[0]]))
        lo[group] = np.searchsorted(ends, local[group], "right")
        hi[group] = np.searchsorted(ends, local[group] + length, "left")
    counts = hi - lo
    stops = np.cumsum(counts)
    flat = np.empty(int(stops[-1]), np.int32)
    for group in groups:
        inner = _count_up(counts[group])
        repeat = np.repeat(group, counts[group])
        flat[(stops - counts)[repeat] + inner] = (
            reader.doc_ends(int(shard[group[0]]))[lo[repeat] + inner] - local[repeat]
        )
    return flat, np.concatenate(([0], stops[np.cumsum(n_pieces) - 1]))


def _count_up(counts: Int64s) -> Int64s:
    """[2, 3] → [0, 1, 0, 1, 2]."""
    stops = np.cumsum(counts)
    return np.arange(int(stops[-1])) - np.repeat(stops - counts, counts)
