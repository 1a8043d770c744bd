"""The means over the classes of each one's precision and recall."""

from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.class_counts import ClassMetric
from mpillm.tasks.metrics.metric import Array, Totals


class MacroPrecision(ClassMetric):
    """Macro precision: of the targets found to be of a class, the share that is; 0 of none.

    A class that is neither found nor there is left out, as in scikit-learn.
    """

    name: ClassVar[str] = "precision"
    title: ClassVar[str] = "macro precision"

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, targets = sums.reshape(3, -1)
        known = found + targets > 0
        return float((both[known] / np.maximum(found[known], 1)).mean())


class MacroRecall(MacroPrecision):
    """Macro recall: of the targets of a class, the share that is found; 0 of none."""

    name: ClassVar[str] = "recall"
    title: ClassVar[str] = "macro recall"

    def value(self, sums: Array, totals: Totals) -> float:
        both, found, targets = sums.reshape(3, -1)
        known = found + targets > 0
        return float((both[known] / np.maximum(targets[known], 1)).mean())
