"""Counts of each class that precision, recall and F1 are made of."""

from collections.abc import Sequence

import numpy as np

from mpillm.tasks.metrics.metric import Array, Arrays


def class_counts(outputs: Sequence[Array], fields: Arrays) -> Array:
    """Count each row's classes: found rightly, found, and there; (B, 3 · classes).

    A class is found where its output is the largest. Targets that do not count are left out.
    """
    rows, classes = len(outputs[0]), outputs[0].shape[-1]
    found, targets = outputs[0].argmax(-1), fields["targets"]
    row_of = np.broadcast_to(np.arange(rows).reshape(-1, *[1] * (found.ndim - 1)), found.shape)
    if "counts" in fields:
        counted = fields["counts"].astype(bool)
        found, targets, row_of = found[counted], targets[counted], row_of[counted]
    found, targets, row_of = found.reshape(-1), targets.reshape(-1), row_of.reshape(-1)
    right = found == targets
    # The place of each count in an array (rows, 3, classes).
    places = [
        (3 * row_of[right] + 0) * classes + targets[right],
        (3 * row_of + 1) * classes + found,
        (3 * row_of + 2) * classes + targets,
    ]
    counts = np.bincount(np.concatenate(places), minlength=3 * rows * classes)
    return counts.astype(np.float64).reshape(rows, 3 * classes)
