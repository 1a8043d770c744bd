"""How far the probabilities of a classifier are from the shares that come true.

Shapes: N targets that count, V classes, M bins.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.class_counts import counted_classes
from mpillm.tasks.metrics.metric import CLASSES, Array, Arrays, Metric, Totals

BINS = 15


class CalibrationError(Metric):
    """Expected calibration error: 15 equal bins of the largest probability (Guo et al. 2017).

    Its value is the mean over targets of |share that is right - mean probability| of their bin.
    """

    name: ClassVar[str] = "ece"
    title: ClassVar[str] = "ECE"
    lower_is_better: ClassVar[bool] = True
    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        rows = len(outputs[0])
        row_of, found, targets = counted_classes(outputs, fields)
        largest = _probabilities(outputs, fields).max(-1)
        # A bin has its upper edge, and not its lower one.
        bins = (np.ceil(largest * BINS).astype(np.int64) - 1).clip(0, BINS - 1)
        statistics = np.zeros((3, rows, BINS))
        for number, values in enumerate((1.0, largest, found == targets)):
            np.add.at(statistics[number], (row_of, bins), values)
        return statistics.transpose(1, 0, 2).reshape(rows, 3 * BINS)

    def value(self, sums: Array, totals: Totals) -> float:
        counts, largest, right = sums.reshape(3, BINS)
        return float(np.abs(right - largest).sum() / max(counts.sum(), 1))


class Reliability(CalibrationError):
    """The bins of the calibration error: the numbers of a reliability plot.

    Of each bin with targets: its upper edge, its targets, their mean probability, and the share
    that is right.
    """

    name: ClassVar[str] = "reliability"
    title: ClassVar[str] = "reliability"
    is_table: ClassVar[bool] = True
    table_columns: ClassVar[tuple[str, ...]] = (
        "probability up to",
        "targets",
        "mean probability",
        "share right",
    )

    def table(self, sums: Array) -> list[list[float]]:
        counts, largest, right = sums.reshape(3, BINS)
        return [
            [(number + 1) / BINS, int(count), float(mass / count), float(hits / count)]
            for number, (count, mass, hits) in enumerate(zip(counts, largest, right, strict=True))
            if count > 0
        ]


class Brier(Metric):
    """The squared distance of the probabilities from what is, summed over classes (Brier 1950)."""

    name: ClassVar[str] = "brier"
    title: ClassVar[str] = "Brier score"
    lower_is_better: ClassVar[bool] = True
    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        row_of, _, targets = counted_classes(outputs, fields)
        probabilities_NV = _probabilities(outputs, fields)
        probabilities_NV[np.arange(len(targets)), targets] -= 1
        distances = np.square(probabilities_NV).sum(-1)
        sums = np.bincount(row_of, distances, minlength=len(outputs[0]))
        return np.stack([sums, np.bincount(row_of, minlength=len(outputs[0]))], 1)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0] / max(sums[1], 1))


def _probabilities(outputs: Sequence[Array], fields: Arrays) -> Array:
    """Return the probabilities (N, V) of the targets that count."""
    logits = outputs[0].astype(np.float64)
    logits_NV = (
        logits[fields["counts"].astype(bool)]
        if "counts" in fields
        else logits.reshape(-1, logits.shape[-1])
    )
    powers_NV = np.exp(logits_NV - logits_NV.max(-1, keepdims=True, initial=-np.inf))
    return np.asarray(powers_NV / powers_NV.sum(-1, keepdims=True))
