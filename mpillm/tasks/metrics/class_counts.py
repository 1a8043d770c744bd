"""Counts of each class, and the base of the metrics made of them: precision, recall, F1."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import CLASSES, SETS, Array, Arrays, Metric


def counted_classes(outputs: Sequence[Array], fields: Arrays) -> tuple[Array, Array, Array]:
    """Return the row, the class found and the class of each target that counts, (N,) each.

    A class is found where its output is the largest.
    """
    found, targets = outputs[0].argmax(-1), fields["targets"]
    row_of = np.broadcast_to(
        np.arange(len(found)).reshape(-1, *[1] * (found.ndim - 1)), found.shape
    )
    if "counts" not in fields:
        return row_of.reshape(-1), found.reshape(-1), targets.reshape(-1)
    counted = fields["counts"].astype(bool)
    return row_of[counted], found[counted], targets[counted]


def class_counts(outputs: Sequence[Array], fields: Arrays) -> Array:
    """Count each row's classes: found rightly, found, and there; (B, 3 · classes)."""
    rows, classes = len(outputs[0]), outputs[0].shape[-1]
    row_of, found, targets = counted_classes(outputs, fields)
    right = found == targets
    # The place of each count in an array (rows, 3, classes).
    places = [
        3 * row_of[right] * classes + targets[right],
        (3 * row_of + 1) * classes + found,
        (3 * row_of + 2) * classes + targets,
    ]
    counts = np.bincount(np.concatenate(places), minlength=3 * rows * classes)
    return counts.reshape(rows, 3 * classes)


def set_counts(outputs: Sequence[Array], fields: Arrays) -> Array:
    """Count the same of rows with any set of classes each; (B, 3 · classes).

    A class is found where its output is above 0. `targets` (B, classes) are 1 or 0.
    """
    targets = fields["targets"] > 0
    found = outputs[0][:, : targets.shape[1]] > 0
    return np.concatenate([found & targets, found, targets], 1).astype(np.float64)


class ClassMetric(Metric):
    """A metric whose statistics are the counts of each class.

    See `class_counts`, and of rows with several classes `set_counts`.
    """

    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES + SETS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        # Of one class each, targets have a dim less than outputs.
        sets = fields["targets"].ndim == outputs[0].ndim
        return set_counts(outputs, fields) if sets else class_counts(outputs, fields)
