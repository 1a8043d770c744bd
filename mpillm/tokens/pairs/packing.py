"""Pack conversations into rows, each whole and in one row: first-fit decreasing (Johnson 1973).

The packing is a pure function of the lengths and the seed. A step's rows are a pure function of
(seed, step): each epoch takes all rows once, in an order of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.tokens.order import permute

Int64s = np.ndarray[Any, np.dtype[np.int64]]
# Conversations that are packed together. More waste less: of 1,024 short ones some 1%.
WINDOW = 1024
# An epoch that no order of rows has: the packing shuffles by it.
PACKING_EPOCH = 1 << 62


@dataclass(frozen=True)
class Packing:
    """Row r has the conversations `members[firsts[r] : firsts[r + 1]]`, in this order."""

    members: Int64s
    firsts: Int64s

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def of_row(self, row: int) -> Int64s:
        return self.members[self.firsts[row] : self.firsts[row + 1]]

    def rows(self, samples: Int64s, seed: int) -> Int64s:
        """Find the row of each sample: int64 sample ids (n,) → rows (n,)."""
        epochs = samples // len(self)
        return permute(samples - epochs * len(self), len(self), seed, epochs)


def pack_rows(lengths: Int64s, capacity: int, seed: int) -> Packing:
    """Pack conversations of `lengths` tokens, (n,), into rows of `capacity` tokens.

    Those of 0 are left out; none is longer than a row. They are shuffled, and each window of
    WINDOW in this order is packed by itself, the longest ones first.
    """
    numbers = np.arange(len(lengths), dtype=np.int64)
    order = permute(numbers, len(lengths), seed, np.full(len(lengths), PACKING_EPOCH))
    order = order[lengths[order] > 0]
    members: list[Int64s] = []
    counts: list[int] = []
    for first in range(0, len(order), WINDOW):
        window = order[first : first + WINDOW]
        for row in _first_fit(lengths[window], capacity):
            members.append(window[row])
            counts.append(len(row))
    firsts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return Packing(np.concatenate(members or [numbers[:0]]), firsts)


def one_a_row(lengths: Int64s) -> Packing:
    """Give each conversation a row of its own; those of 0 tokens are left out."""
    members = np.flatnonzero(lengths)
    return Packing(members, np.arange(len(members) + 1, dtype=np.int64))


def _first_fit(lengths: Int64s, capacity: int) -> list[list[int]]:
    """Put each, from the longest on, into the first row that has room for it."""
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    # Stable: equal lengths stay in the shuffled order on every machine.
    for number in np.argsort(-lengths, kind="stable").tolist():
        # The first row with room, or the next one, which is empty.
        fits = room[: len(rows)] >= lengths[number]
        place = int(fits.argmax()) if fits.any() else len(rows)
        if place == len(rows):
            rows.append([])
            room[place] = capacity
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows
