"""The share of counted targets whose own output is the largest."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import Arrays, Metric, Totals


class Accuracy(Metric):
    """Top-1 accuracy over the targets that count, of tokens or of classes."""

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "accuracy"
    sums_positions: ClassVar[bool] = True

    def of_batch(
        self, outputs: Sequence[np.ndarray[Any, np.dtype[Any]]], fields: Arrays
    ) -> Sequence[float]:
        hits = outputs[0].argmax(-1) == fields["targets"]
        counts = fields.get("counts")
        return [float(hits.sum() if counts is None else (hits * counts).sum())]

    def value(self, sums: Sequence[float], totals: Totals) -> float:
        return sums[0] / totals.weight
