"""Sums over the rows of all ranks whose bits do not depend on how ranks share the rows.

Addition of integers is exact in float64 up to 2^53. So each statistic is rounded to a multiple of
a power of two, which follows from its largest value and the number of rows. Then every partial sum
is exact, in any order. What the rounding leaves is summed in the same way (Demmel & Nguyen 2013,
"Fast reproducible floating-point summation").

Shapes: B rows of a batch, U columns that are not 0 in it, K columns in all, R replicates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING

import numpy as np

from mpillm.tasks.metrics.metric import Array, RowStatistics

if TYPE_CHECKING:
    from mpi4py import MPI

BATCH_ROWS = 256
# A row is drawn 15 times at most (bootstrap.MOST_DRAWS): 4 bits.
DRAW_BITS = 4
# Below 2^-400 units would not be normal numbers, above 2^900 sums not finite.
LEAST_EXPONENT, MOST_EXPONENT = -400, 900


@dataclass(frozen=True)
class OwnRows:
    """Rows of this rank, by their numbers (B,) among those of all ranks."""

    numbers_B: Array
    statistics: RowStatistics


def in_batches(numbers_B: Array, table_BK: Array) -> list[OwnRows]:
    """Cut rows with these numbers into batches: a bootstrap has a weight of each replicate a row.

    Batches of a few rows also have few columns that are not 0.
    """
    parts = [slice(first, first + BATCH_ROWS) for first in range(0, len(numbers_B), BATCH_ROWS)]
    return [OwnRows(numbers_B[part], RowStatistics.joined([table_BK[part]])) for part in parts]


class ExactSums:
    """Sums of statistics over the rows of all ranks. Every rank of `comm` calls each method.

    A rank may have no rows, or a part of the statistics of rows whose positions ranks share. A
    column with a value that is not finite has the sum NaN.
    """

    def __init__(self, own: Sequence[OwnRows], comm: "MPI.Intracomm") -> None:
        from mpi4py import MPI

        self._own, self._comm = own, comm
        facts = comm.allgather(
            (
                max((each.statistics.width for each in own), default=0),
                sum(each.statistics.rows for each in own),
            )
        )
        self.width = max(width for width, _ in facts)
        largest_K = np.zeros(self.width)
        for each in own:
            columns, values = each.statistics.columns_U, np.abs(each.statistics.values_BU)
            finite = np.where(np.isfinite(values), values, np.inf).max(0, initial=0)
            largest_K[columns] = np.maximum(largest_K[columns], finite)
        comm.Allreduce(MPI.IN_PLACE, largest_K, MPI.MAX)
        self._odd_K = ~np.isfinite(largest_K)
        exponents = np.frexp(np.where(self._odd_K, 1, largest_K))[1]
        # |value| < 2^exponent, so a value is less than 2^bits units.
        self._bits = 53 - DRAW_BITS - ceil(log2(max(1, sum(rows for _, rows in facts))))
        exponents = exponents.clip(LEAST_EXPONENT, MOST_EXPONENT) - self._bits
        self._unit_K = np.ldexp(1.0, exponents)

    def whole(self) -> Array:
        """Sum all rows, (K,)."""
        sums_2K = np.zeros((2, self.width))
        for each in self._own:
            columns, values = each.statistics.columns_U, each.statistics.values_BU
            upper = self._rounded(values, columns)
            rest = self._rounded((values - upper) * 2.0**self._bits, columns)
            sums_2K[0, columns] += upper.sum(0)
            sums_2K[1, columns] += rest.sum(0)
        upper_K, rest_K = self._over_ranks(sums_2K)
        return np.asarray(upper_K + rest_K * 2.0**-self._bits)

    def weighted(self, weights_of: Callable[[Array], Array], replicates: int) -> Array:
        """Sum the rows, each as often as each replicate has it, (R, K).

        `weights_of(numbers_B)` gives whole numbers (R, B), below 2^DRAW_BITS, of the rows with
        these numbers.
        """
        sums_RK = np.zeros((replicates, self.width))
        for each in self._own:
            columns, values = each.statistics.columns_U, each.statistics.values_BU
            weights_RB = weights_of(each.numbers_B)
            sums_RK[:, columns] += weights_RB @ self._rounded(values, columns)
        return self._over_ranks(sums_RK)

    def _rounded(self, values_BU: Array, columns: Array) -> Array:
        """Round to whole units, of which all sums have fewer than 2^53."""
        unit_U = self._unit_K[columns]
        finite = np.where(self._odd_K[columns], 0, values_BU)
        return np.asarray(np.rint(finite / unit_U) * unit_U)

    def _over_ranks(self, sums: Array) -> Array:
        from mpi4py import MPI

        self._comm.Allreduce(MPI.IN_PLACE, sums)
        sums[:, self._odd_K] = np.nan
        return sums
