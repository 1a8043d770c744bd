"""The mean over the classes of each one's F1 score."""

from collections.abc import Sequence
from typing import ClassVar

from mpillm.tasks.metrics.class_counts import class_counts
from mpillm.tasks.metrics.metric import CLASSES, Array, Arrays, Metric, Totals


class MacroF1(Metric):
    """Macro F1: classes count alike, however rare.

    A class that is neither found nor there is left out.
    """

    name: ClassVar[str] = "macro-f1"
    title: ClassVar[str] = "macro F1"
    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        return class_counts(outputs, fields)

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, targets = sums.reshape(3, -1)
        known = found + targets > 0
        return float((2 * both[known] / (found + targets)[known]).mean())
