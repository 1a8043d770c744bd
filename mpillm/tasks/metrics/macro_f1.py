"""The mean over the classes of each one's F1 score."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import Arrays, Metric, Totals


class MacroF1(Metric):
    """Macro F1: classes count alike, however rare.

    A class that is neither found nor there is left out.
    """

    name: ClassVar[str] = "macro-f1"
    title: ClassVar[str] = "macro F1"
    sums_positions: ClassVar[bool] = True

    def of_batch(
        self, outputs: Sequence[np.ndarray[Any, np.dtype[Any]]], fields: Arrays
    ) -> Sequence[float]:
        classes = outputs[0].shape[-1]
        found, targets = outputs[0].argmax(-1), fields["targets"]
        if "counts" in fields:
            counted = fields["counts"].astype(bool)
            found, targets = found[counted], targets[counted]
        both = targets[found == targets]
        parts = (
            np.bincount(each.reshape(-1), minlength=classes) for each in (both, found, targets)
        )
        return [float(number) for part in parts for number in part]

    def value(self, sums: Sequence[float], totals: Totals) -> float:
        both, found, targets = np.array(sums).reshape(3, -1)
        known = found + targets > 0
        return float((2 * both[known] / (found + targets)[known]).mean())
