"""Rows of conversations for training and evaluation: packed, or each in a row of its own.

B rows of T + 1 tokens: a row's last token is a target alone. A conversation that is longer than a
row is cut after its last whole answer that fits.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.errors import DataError
from mpillm.tokens.order import task_keys
from mpillm.tokens.pairs.packing import Packing, one_a_row, pack_rows
from mpillm.tokens.pairs.pair_shards import LEARNT
from mpillm.tokens.samples import RawRows, RowShape

if TYPE_CHECKING:
    from mpillm.tokens.pairs.pair_reader import PairReader

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


# Of a pair of preferences.
TWO = ", both answers together with their prompts"


class ChatLengths:
    """The tokens of each conversation that rows of `capacity` tokens take: `kept`, (n,).

    0: it is left out, as no answer begins in a row. `whole`: how many end after a whole answer.
    """

    def __init__(self, reader: "PairReader", capacity: int) -> None:
        """Measure the conversations of a split. Raises DataError."""
        self.kept = reader.lengths()
        self.long = np.flatnonzero(self.kept > capacity).tolist()
        self.whole = 0
        # A preference is about whole answers.
        self._whole_alone = reader.form.sides.is_preference
        for pair in self.long:
            kept, whole = 0, False
            if not self._whole_alone:
                kept, whole = cut_place(reader.supervised(pair), capacity)
            self.kept[pair], self.whole = kept, self.whole + whole
        if not self.kept.any():
            lacks = "has an answer that begins" if not self._whole_alone else "is whole"
            raise DataError(
                f"no conversation of the {reader.name} split of {reader.manifest.folder} {lacks} "
                f"within {capacity:,} tokens{TWO * (reader.form.sides.sides > 1)}; raise "
                "model.context"
            )

    @property
    def left_out(self) -> int:
        return int((self.kept[self.long] == 0).sum())

    def describe(self) -> str:
        """Say how many conversations are cut, and where; "" for none."""
        if self._whole_alone and self.long:
            many = f"{len(self.long):,} of {len(self.kept):,} records"
            return f"left out: {many} are longer than a row; raise model.context"
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

    Preferences are numbered always, the two answers of a pair apart. They have `rejected`, 1 for
    tokens of rejected answers, and `reference`, float64: the reference's log-probability of an
    answer, at the first token of its conversation.
    """
    sides = reader.form.sides
    tokens_BT = np.full((len(rows), length), reader.form.padding, np.int64)
    learnt_BT = np.zeros((len(rows), length), np.uint8)
    documents_BT = np.zeros((len(rows), length), np.int64)
    reference_BT = np.zeros((len(rows), length) if sides.is_preference else 0)
    for row, pairs in enumerate(rows):
        place = 0
        for number, pair in enumerate(pairs.tolist()):
            ids, marks = reader.conversation(pair, int(kept[pair]))
            part = slice(place, place + len(ids))
            tokens_BT[row, part], learnt_BT[row, part] = ids, marks
            documents_BT[row, part] = number * sides.sides
            if sides.sides > 1:
                documents_BT[row, part] += marks >> 1
            if sides.is_preference:
                _place_reference(reference_BT[row, part], marks, reader.reference_of(pair))
            place += len(ids)
        documents_BT[row, place:] = len(pairs) * sides.sides
    found: RawRows = {"tokens": tokens_BT, "supervised": learnt_BT & LEARNT}
    if sides.is_preference:
        found |= {"rejected": learnt_BT >> 1, "reference": reference_BT}
    numbered = numbered or sides.is_preference
    return {**found, "documents": documents_BT} if numbered else found


def _place_reference(reference_T: Array, marks_T: Array, values: Array) -> None:
    """Set the value of each side, (2,), where its conversation begins."""
    rejected_T = marks_T >> 1
    begins_T = np.flatnonzero(np.diff(rejected_T, prepend=1 - rejected_T[:1]))
    reference_T[begins_T] = values[rejected_T[begins_T]]


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
