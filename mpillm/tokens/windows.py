"""Windows of tokens: planned many at a time, then read by one `preadv` each into a batch's rows.

B windows of T tokens: `tokens_BT`. Evaluation cuts a split into windows in order.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpillm.errors import DataError
from mpillm.tokens.order import task_keys

if TYPE_CHECKING:
    from mpillm.tokens.reader import TokenReader

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Windows:
    """`tokens_BT`, u2 or u4, and where documents end in each row.

    Row b's ends are `ends[splits[b] : splits[b + 1]]` (int32, ascending, each in [1, T - 1]): the
    token at an end is the first of the next document. `starts` numbers the rows' first tokens in
    the split.
    """

    tokens_BT: Array
    ends: Array
    splits: Int64s
    starts: Int64s

    def ends_of(self, row: int) -> Array:
        """Return the document ends of one row."""
        return self.ends[self.splits[row] : self.splits[row + 1]]

    def fields(self, documents: bool) -> dict[str, Array]:
        """Return a batch's raw arrays: `tokens` (B, T) and, with `documents`, document numbers.

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
    """Windows of `length` tokens to read: files, byte offsets, and the document ends inside."""

    def __init__(
        self, reader: "TokenReader", starts: Int64s, length: int, boundaries: bool = True
    ) -> None:
        """Plan the windows at `starts`, int64 (n,), each in [0, n_tokens - length].

        `boundaries`: look up the document ends. Raises DataError.
        """
        self.reader, self.starts, self.length = reader, starts, length
        shards = reader.shards_of(starts)
        # Lists: a batch is read in a loop, and taking numbers out of arrays would cost as much.
        self.shards: list[int] = shards.tolist()
        self.offsets: list[int] = reader.offsets_of(starts, shards).tolist()
        self.crossing: list[int] = np.flatnonzero(
            starts + length > reader.firsts[shards + 1]
        ).tolist()
        found: tuple[Array, Int64s] = (
            document_ends(reader, starts, length)
            if boundaries
            else (np.empty(0, np.int32), np.zeros(len(starts) + 1, np.int64))
        )
        self.ends, self.splits = found

    def fetch(self, first: int, out: Array) -> Windows:
        """Read the windows `first` … `first` + B - 1 into the rows of `out` (B, length).

        `out` is C-contiguous, of the reader's dtype. Raises DataError.
        """
        assert out.flags.c_contiguous, "a copy would be filled in place of the rows"
        last, reader = first + len(out), self.reader
        nbytes = self.length * reader.dtype.itemsize
        # Slices of one view of bytes are made faster than views of an array's rows.
        flat = out.reshape(-1).data.cast("B")
        rows = [(flat[start : start + nbytes],) for start in range(0, len(flat), nbytes)]
        files = reader.descriptors(self.shards[first:last])
        # The loop is map and sum, so that all of it but the system calls runs in C.
        short = sum(map(os.preadv, files, rows, self.offsets[first:last])) != len(flat)
        # One call cannot read a window across two shards; after a short read, repeat all of them.
        span = slice(bisect_left(self.crossing, first), bisect_left(self.crossing, last))
        for window in range(first, last) if short else self.crossing[span]:
            reader.read(int(self.starts[window]), out[window - first])
        reader.check_ids(out, self.starts[first:last])
        splits = self.splits[first : last + 1]
        ends = self.ends[splits[0] : splits[-1]]
        return Windows(out, ends, splits - splits[0], self.starts[first:last])

    def advise(self, first: int, count: int) -> None:
        """Ask the kernel to read windows ahead (POSIX_FADV_WILLNEED): cold reads then overlap."""
        descriptors = self.reader.descriptors(self.shards[first : first + count])
        nbytes, advise = self.length * self.reader.dtype.itemsize, os.posix_fadvise
        for descriptor, offset in zip(
            descriptors, self.offsets[first : first + count], strict=True
        ):
            advise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def document_ends(reader: "TokenReader", starts: Int64s, length: int) -> tuple[Array, Int64s]:
    """Find the document ends e of each window with start < e < start + length, less start.

    Returns them flat (int32) with row splits (int64). A window across shards is searched in each
    of them: `piece` numbers the (window, shard) pairs, window-major, so the pieces' ends in that
    order are the flat array.
    """
    first_shards = reader.shards_of(starts)
    n_pieces = reader.shards_of(starts + (length - 1)) - first_shards + 1
    window = np.repeat(np.arange(len(starts)), n_pieces)
    shard = first_shards[window] + _count_up(n_pieces)
    local = starts[window] - reader.firsts[shard]
    # In order of position: shards come in groups, and neighbours find their pages in the cache.
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
    """Count up to each number: [2, 3] → [0, 1, 0, 1, 2]."""
    stops = np.cumsum(counts)
    return np.arange(int(stops[-1])) - np.repeat(stops - counts, counts)


class EvaluationBatch(NamedTuple):
    """`rows` windows: row r is the `length` + 1 tokens from `start` + r · `length` on."""

    start: int
    rows: int
    length: int


def evaluation_batches(n_tokens: int, context: int, rows: int) -> list[EvaluationBatch]:
    """Cut `n_tokens` into windows of `context` inputs, `rows` windows a batch.

    Every token but the first is a target exactly once; the rest at the end is a batch of one row.
    Rank r of n takes [r::n]. Raises DataError when there is no target.
    """
    if n_tokens < 2:
        raise DataError(
            "evaluation needs at least 2 tokens, an input and a target; "
            f"the split has {n_tokens}; prepare it with a larger --validation"
        )
    windows, left = divmod(n_tokens - 1, context)
    batches = [
        EvaluationBatch(first * context, min(rows, windows - first), context)
        for first in range(0, windows, rows)
    ]
    return batches + ([EvaluationBatch(windows * context, 1, left)] if left else [])


def read_evaluation(reader: "TokenReader", batch: EvaluationBatch) -> Windows:
    """Read a batch's windows: tokens (rows, length + 1) and document ends. Raises DataError."""
    starts = batch.start + np.arange(batch.rows, dtype=np.int64) * batch.length
    plan = ReadPlan(reader, starts, batch.length + 1)
    return plan.fetch(0, np.empty((batch.rows, batch.length + 1), reader.dtype))


class EvaluationWindows:
    """A split in order, in batches of `rows` rows of `tokens` tokens.

    The last token of a row is the first of the next: of causal LM each but one is a target once.
    """

    def __init__(self, reader: "TokenReader", tokens: int, rows: int) -> None:
        self._reader, self._context = reader, tokens - 1
        self._batches = evaluation_batches(reader.n_tokens, self._context, rows)
        self.shapes = [(batch.rows, batch.length + 1) for batch in self._batches]
        """The rows, and the tokens of each, by the batch."""

    def raw(self, number: int) -> dict[str, Array]:
        """Read the arrays of batch `number`, with a key of each row. Raises DataError."""
        batch = self._batches[number]
        row = batch.start // self._context
        rows = np.arange(row, row + batch.rows, dtype=np.int64)
        tokens_BT = read_evaluation(self._reader, batch).tokens_BT
        return {"tokens": tokens_BT, "keys": task_keys(0, rows)}
