"""Spearman's rank correlation of the numbers found and the targets.

Shapes: N rows of all ranks, G distinct numbers among them.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import NUMBERS, Array, Arrays, Metric, Totals
from mpillm.tasks.metrics.regression import number_pairs


class Spearman(Metric):
    """Pearson's correlation of the places in order, equal numbers at the mean of their places.

    0 where one side is constant, as of Pearson's (Spearman 1904).
    """

    name: ClassVar[str] = "spearman"
    title: ClassVar[str] = "Spearman's ρ"
    output_kinds: ClassVar[tuple[str, ...]] = NUMBERS
    needs_all_rows: ClassVar[bool] = True

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        return np.stack(number_pairs(outputs, fields), 1)

    def values_of_rows(self, rows_NK: Array, draws_RN: Array) -> Array:
        if not np.isfinite(rows_NK).all():
            return np.full(len(draws_RN), np.nan)
        groups = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in rows_NK.T]
        return np.array([_correlation(groups, weights_N) for weights_N in draws_RN])

    def value(self, sums: Array, totals: Totals) -> float:
        raise NotImplementedError("a rank correlation needs the rows, and no sums of them")


def _correlation(groups: Sequence[Array], weights_N: Array) -> float:
    """Correlate the places of rows that are there `weights_N` times each; NaN without a row."""
    weights_N = weights_N.astype(np.float64)
    if not weights_N.any():
        return math.nan
    x_N, y_N = (_places(group_N, weights_N) for group_N in groups)
    xx, yy, xy = (
        float((weights_N * one * other).sum())
        for one, other in ((x_N, x_N), (y_N, y_N), (x_N, y_N))
    )
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def _places(group_N: Array, weights_N: Array) -> Array:
    """Return the place of each row in order, less the mean place of all."""
    counts_G = np.bincount(group_N, weights_N)
    # Rows of a group of c that follow b others have the places b + 1 … b + c.
    middle_G = counts_G.cumsum() - (counts_G - 1) / 2
    return np.asarray(middle_G[group_N] - (weights_N.sum() + 1) / 2)
