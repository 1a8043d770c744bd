"""Rows of conversations for training and evaluation: packed, or each in a row of its own.

B rows of T + 1 tokens: a row's last token is a target alone. A conversation that is longer than a
row is cut after its last whole answer that fits.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.errors import DataError
from mpillm.tokens.order import task_keys
from mpillm.tokens.pairs.packing import Packing, one_a_row, pack_rows
from mpillm.tokens.samples import RawRows, RowShape

if TYPE_CHECKING:
    from mpillm.tokens.pairs.pair_reader import PairReader

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


class ChatLengths:
    """The tokens of each conversation that rows of `capacity` tokens take: `kept`, (n,).

    0: it is left out, as no answer begins in a row. `whole`: how many end after a whole answer.
    """

    def __init__(self, reader: "PairReader", capacity: int) -> None:
        """Measure the conversations of a split. Raises DataError."""
        self.kept = reader.lengths()
        self.long = np.flatnonzero(self.kept > capacity).tolist()
        self.whole = 0
        for pair in self.long:
            kept, whole = cut_place(reader.supervised(pair), capacity)
            self.kept[pair], self.whole = kept, self.whole + whole
        if not self.kept.any():
            raise DataError(
                f"no conversation of the {reader.name} split of {reader.manifest.folder} has an "
                f"answer that begins within {capacity:,} tokens; raise model.context"
            )

    @property
    def left_out(self) -> int:
        return int((self.kept[self.long] == 0).sum())

    def describe(self) -> str:
        """Say how many conversations are cut, and where; "" for none."""
        parts = {
            "end after a whole answer": self.whole,
            "within one": len(self.long) - self.whole - self.left_out,
            "are left out, as no answer begins in a row": self.left_out,
        }
        counts = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        of = f"{len(self.long):,} of {len(self.kept):,} conversations"
        return f"cut off: {of} are longer than a row: {counts}" if counts else ""


def cut_place(supervised: Array, capacity: int) -> tuple[int, bool]:
    """Return how many tokens of a long conversation are kept, and whether whole answers are.

    0 where no answer begins within `capacity` tokens.
    """
    learnt = np.flatnonzero(supervised[:capacity])
    if not len(learnt):
        return 0, False
    # An answer ends where the next token is not learnt.
    ends = learnt[supervised[learnt + 1] == 0]
    return (int(ends[-1]) + 1, True) if len(ends) else (int(learnt[-1]) + 1, False)


def read_rows(
    reader: "PairReader", rows: list[Int64s], kept: Int64s, length: int, numbered: bool
) -> RawRows:
    """Read the conversations of each row: `tokens`, `supervised`, (B, length), and where
    `numbered` their `documents`. Padding is a document of its own. Raises DataError.
    """
    tokens_BT = np.full((len(rows), length), reader.form.padding, np.int64)
    learnt_BT = np.zeros((len(rows), length), np.uint8)
    documents_BT = np.zeros((len(rows), length), np.int64)
    for row, pairs in enumerate(rows):
        place = 0
        for number, pair in enumerate(pairs.tolist()):
            ids, learnt = reader.conversation(pair, int(kept[pair]))
            part = slice(place, place + len(ids))
            tokens_BT[row, part], learnt_BT[row, part] = ids, learnt
            documents_BT[row, part] = number
            place += len(ids)
        documents_BT[row, place:] = len(pairs)
    found: RawRows = {"tokens": tokens_BT, "supervised": learnt_BT}
    return {**found, "documents": documents_BT} if numbered else found


class ChatSteps:
    """The rows of a training run, a pure function of (seed, step)."""

    def __init__(self, reader: "PairReader", row: RowShape, batch: int, seed: int) -> None:
        """`row.documents`: several conversations share a row. Raises DataError."""
        self._reader, self._row, self._batch, self._seed = reader, row, batch, seed
        self._kept = reader.row_lengths(row).kept
        packed = row.documents
        self.packing: Packing = (
            pack_rows(self._kept, row.tokens, seed) if packed else one_a_row(self._kept)
        )

    def raw(self, step: int, first: int, count: int) -> RawRows:
        """Read the rows `first` … `first` + `count` - 1 of the batch of `step`.

        Any rank may call it for any rows, in any order. Raises DataError.
        """
        samples = step * self._batch + np.arange(first, first + count, dtype=np.int64)
        rows = [self.packing.of_row(row) for row in self.packing.rows(samples, self._seed).tolist()]
        row = self._row
        raw = read_rows(self._reader, rows, self._kept, row.tokens, row.documents)
        return {**raw, "keys": task_keys(self._seed, samples)}


class ChatBatches:
    """All conversations of a split in order, one a row, in batches of `rows`.

    The rows of a batch are as long as its longest one: an evaluation computes no more.
    """

    def __init__(self, reader: "PairReader", row: RowShape, rows: int) -> None:
        self._reader, self._kept = reader, reader.row_lengths(row).kept
        members = np.flatnonzero(self._kept)
        self._batches = [members[first : first + rows] for first in range(0, len(members), rows)]
        # A row of one token has no target.
        self._lengths = [max(2, int(self._kept[batch].max())) for batch in self._batches]
        self.shapes = [
            (len(batch), length - 1)
            for batch, length in zip(self._batches, self._lengths, strict=True)
        ]
        """The rows of each batch, and the positions of each."""

    def raw(self, number: int) -> RawRows:
        """Read the arrays of batch `number`, with a key of each row. Raises DataError."""
        members = self._batches[number]
        rows = [members[place : place + 1] for place in range(len(members))]
        raw = read_rows(self._reader, rows, self._kept, self._lengths[number], numbered=False)
        return {**raw, "keys": task_keys(0, members)}
