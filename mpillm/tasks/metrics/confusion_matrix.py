"""How many targets of each class were found to be of which class."""

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from mpillm.errors import UsageError
from mpillm.tasks.metrics.class_counts import counted_classes
from mpillm.tasks.metrics.metric import CLASSES, Array, Arrays, Metric, Totals

# Of more classes no table can be read, and their square fills the memory.
MOST_CLASSES = 200


class ConfusionMatrix(Metric):
    """A table: a line for each class of the targets, a column for each class found.

    Its value is the share of the diagonal.
    """

    name: ClassVar[str] = "confusion-matrix"
    title: ClassVar[str] = "confusion matrix"
    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES
    is_table: ClassVar[bool] = True

    @classmethod
    def make(cls, classes: Sequence[str] = ()) -> Self:
        if len(classes) > MOST_CLASSES:
            raise UsageError(
                f"confusion-matrix has a line for each class, up to {MOST_CLASSES}, and the data "
                f"has {len(classes):,}; take precision, recall or macro-f1"
            )
        return cls()

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        rows, classes = len(outputs[0]), outputs[0].shape[-1]
        row_of, found, targets = counted_classes(outputs, fields)
        places = (row_of * classes + targets) * classes + found
        counts = np.bincount(places, minlength=rows * classes * classes)
        return counts.reshape(rows, classes * classes)

    def table(self, sums: Array) -> list[list[float]]:
        classes = round(len(sums) ** 0.5)
        counts = sums.reshape(classes, classes).astype(np.int64)
        return [[*row] for row in counts.tolist()]

    def value(self, sums: Array, totals: Totals) -> float:
        return float(np.trace(np.array(self.table(sums))) / sums.sum())
