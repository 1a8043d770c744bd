"""The mean over the classes of each one's F1 score."""

from typing import ClassVar

from mpillm.tasks.metrics.class_counts import ClassMetric
from mpillm.tasks.metrics.metric import Array, Totals


class MacroF1(ClassMetric):
    """Macro F1: classes count alike, however rare.

    A class that is neither found nor there is left out.
    """

    name: ClassVar[str] = "macro-f1"
    title: ClassVar[str] = "macro F1"

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, targets = sums.reshape(3, -1)
        known = found + targets > 0
        return float((2 * both[known] / (found + targets)[known]).mean())
