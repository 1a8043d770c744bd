"""Metrics of numbers: the squared and the absolute error, and Pearson's correlation."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import NUMBERS, Array, Arrays, Metric, Totals


class SquaredError(Metric):
    """The mean squared error of a row's number."""

    name: ClassVar[str] = "mse"
    title: ClassVar[str] = "mean squared error"
    lower_is_better: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = NUMBERS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        found, targets = number_pairs(outputs, fields)
        return np.stack([np.square(found - targets), np.ones_like(found)], 1)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0] / max(sums[1], 1))


class AbsoluteError(SquaredError):
    """The mean absolute error of a row's number."""

    name: ClassVar[str] = "mae"
    title: ClassVar[str] = "mean absolute error"

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        found, targets = number_pairs(outputs, fields)
        return np.stack([np.abs(found - targets), np.ones_like(found)], 1)


class Pearson(Metric):
    """Pearson's correlation of the numbers found and the targets; 0 where one side is constant."""

    name: ClassVar[str] = "pearson"
    title: ClassVar[str] = "Pearson's r"
    output_kinds: ClassVar[tuple[str, ...]] = NUMBERS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        x, y = number_pairs(outputs, fields)
        return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)

    def value(self, sums: Array, totals: Totals) -> float:
        count, x, y, xx, yy, xy = map(float, sums)
        spread = (count * xx - x * x) * (count * yy - y * y)
        return (count * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def number_pairs(outputs: Sequence[Array], fields: Arrays) -> tuple[Array, Array]:
    """Return the number found and the target of each row, (B,) each."""
    rows = len(outputs[0])
    found, targets = outputs[0].reshape(rows), fields["targets"].reshape(rows)
    return found.astype(np.float64), targets.astype(np.float64)
