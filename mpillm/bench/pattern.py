"""Fill arrays with data whose sum is exact in its element type, and count wrong elements.

Rank r's array holds pattern(r)[i mod PERIOD] at i. Every partial sum is a small whole number, so
any order of adding gives the same bits. PERIOD is prime, so no power-of-two block equals its
neighbour.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERIOD = 1009
# Whole numbers up to these are exact: 8 bits of significand in bfloat16, 11 in float16.
EXACT = {
    "int8": 127,
    "uint8": 127,
    "bfloat16": 256,
    "float16": 2048,
    "int16": 32767,
    "uint16": 32767,
}
EXACT_ELSEWHERE = 1 << 20
# A mean may round once more than the sum does: one unit in the last place.
MEAN_ERROR = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}
BLOCK = 997 * PERIOD

Row = NDArray[np.int64]
COMBINE: dict[str, Callable[[Row, Row], Row]] = {
    "sum": np.add,
    "mean": np.add,
    "max": np.maximum,
    "min": np.minimum,
}


def pattern(rank: int, ranks: int, element: str, op: str) -> Row:
    """Give one period of `rank`'s data: whole numbers (PERIOD,), zero or more."""
    index = np.arange(PERIOD, dtype=np.int64)
    limit = EXACT.get(element, EXACT_ELSEWHERE)
    values: Row
    if op == "mean":
        # Neighbours differ by +1 and −1, so that the mean is whole.
        paired = 0 if rank == ranks - 1 and ranks % 2 else 1 - 2 * (rank % 2)
        values = 1 + paired + index * 7919 % max(1, min(limit // ranks, 1 << 16) - 1)
    elif ranks <= limit:
        values = (index * 7919 + rank * 104729) % (limit // ranks + 1)
    else:
        # More ranks than exact numbers: only some ranks add one.
        values = ((index + rank) % (ranks // limit + 1) == 0).astype(np.int64)
    return values


def combined(ranks: int, element: str, op: str) -> Row:
    """Give one period of the result of a reduction over `ranks`."""
    total: Row = reduce(COMBINE[op], (pattern(rank, ranks, element, op) for rank in range(ranks)))
    return total // ranks if op == "mean" else total


def laid(period: Row, first: int, count: int) -> Row:
    """Repeat `period` from element `first` on: (count,)."""
    return np.resize(np.roll(period, -(first % PERIOD)), count) if count else np.empty(0, np.int64)


def fill(array: Any, period: Row, first: int = 0) -> None:
    """Write the data into a flat NumPy array or torch tensor, of any element type and device."""
    for start in range(0, len(array), BLOCK):
        piece = laid(period, first + start, min(BLOCK, len(array) - start))
        array[start : start + len(piece)] = (
            piece if isinstance(array, np.ndarray) else array.new_tensor(piece)
        )


def wrong_elements(array: Any, period: Row, first: int = 0, relative: float = 0.0) -> int:
    """Count elements of a flat array that differ from the repeated `period` by more than
    `relative`.
    """
    wrong = 0
    for start in range(0, len(array), BLOCK):
        piece = array[start : start + BLOCK]
        found = (piece if isinstance(piece, np.ndarray) else piece.double().cpu().numpy()).astype(
            np.float64
        )
        expected = laid(period, first + start, len(found)).astype(np.float64)
        # Not `> relative`: a comparison with not-a-number is false, and it must count as wrong.
        wrong += int(
            len(found) - np.count_nonzero(np.abs(found - expected) <= relative * np.abs(expected))
        )
    return wrong


def count_wrong(
    operation: str, result: Any, bounds: Sequence[int], rank: int, element: str, op: str, root: int
) -> int:
    """Count wrong elements in this rank's flat `result` of an operation on blocks at `bounds`.

    `result`: the whole array; of reduce_scatter the own block. Elements that MPI leaves undefined
    do not count.
    """
    ranks = len(bounds) - 1
    tolerance = MEAN_ERROR.get(element, 0.0) if op == "mean" and ranks & (ranks - 1) else 0.0
    if operation == "reduce_scatter":
        return wrong_elements(result, combined(ranks, element, op), bounds[rank], tolerance)
    if operation == "allreduce" or (operation == "reduce" and rank == root):
        return wrong_elements(result, combined(ranks, element, op), 0, tolerance)
    if operation == "broadcast":
        return wrong_elements(result, pattern(root, ranks, element, op))
    if operation in ("allgather", "alltoall"):
        return sum(
            wrong_elements(
                result[bounds[source] : bounds[source + 1]],
                pattern(source, ranks, element, op),
                bounds[rank if operation == "alltoall" else source],
            )
            for source in range(ranks)
        )
    return 0
