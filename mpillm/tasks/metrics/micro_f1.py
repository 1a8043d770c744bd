"""The F1 score of all decisions, whatever their class."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.class_counts import ClassMetric
from mpillm.tasks.metrics.metric import Array, Arrays, Totals


class MicroF1(ClassMetric):
    """Micro F1. Where each row has one class it is the accuracy."""

    name: ClassVar[str] = "micro-f1"
    title: ClassVar[str] = "micro F1"

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        counts = super().of_rows(outputs, fields)
        return np.asarray(counts.reshape(len(counts), 3, -1).sum(2))

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, targets = sums
        return float(2 * both / max(found + targets, 1.0))
