"""The plan of a step as whole numbers, which rank 0 sends to all ranks. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from mpillm.infer.serve.engine.scheduler import RowPiece, Wanted

Int64s = np.ndarray[Any, np.dtype[np.int64]]
HEADER, ROW = 2, 4


class PlanKind(IntEnum):
    """What the ranks do next."""

    STEP = 1
    END = 2


@dataclass(frozen=True)
class PlannedRow:
    """Some positions of a text: their tokens, and the pages of all its positions."""

    first: int
    """The number of the first position in the text."""
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    """Those up to the last position, in order."""
    wanted: Wanted

    @property
    def length(self) -> int:
        """The positions of the text up to the last one here."""
        return self.first + len(self.tokens)


@dataclass(frozen=True)
class RowPlan:
    """The rows of a step: those of one token that decode first."""

    kind: PlanKind
    rows: tuple[PlannedRow, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[RowPiece], page_tokens: int) -> "RowPlan":
        """Return the plan of the pieces that the scheduler chose."""
        rows = []
        for piece in pieces:
            last = piece.first + piece.count
            tokens = tuple(piece.row.tokens[piece.first : last])
            pages = tuple(piece.row.pages[: -(-last // page_tokens)])
            rows.append(PlannedRow(piece.first, tokens, pages, piece.wanted))
        return cls(PlanKind.STEP, tuple(rows))

    def encode(self) -> Int64s:
        """Write kind and rows, of each row first, tokens, pages and wanted, then the lists."""
        numbers = [int(self.kind), len(self.rows)]
        for row in self.rows:
            numbers += [row.first, len(row.tokens), len(row.pages), int(row.wanted)]
        for row in self.rows:
            numbers += [*row.tokens, *row.pages]
        return np.array(numbers, np.int64)

    @classmethod
    def decode(cls, numbers: Int64s) -> "RowPlan":
        """Read what `encode` wrote."""
        values = numbers.tolist()
        kind, count = values[:HEADER]
        place, rows = HEADER + ROW * count, []
        for number in range(count):
            start = HEADER + ROW * number
            first, tokens, pages, wanted = values[start : start + ROW]
            middle, end = place + tokens, place + tokens + pages
            own = tuple(values[place:middle]), tuple(values[middle:end])
            rows.append(PlannedRow(first, *own, Wanted(wanted)))
            place = end
        return cls(PlanKind(kind), tuple(rows))
