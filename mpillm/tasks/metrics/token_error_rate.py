"""The edits from what CTC hears to the target, over the target's length."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import Arrays, Metric, Totals


class TokenErrorRate(Metric):
    """Tokens inserted, deleted and replaced, a token of the targets; greedy decoding.

    With a token a word it is the word error rate.
    """

    name: ClassVar[str] = "token-error-rate"
    title: ClassVar[str] = "token error rate"

    def of_batch(
        self, outputs: Sequence[np.ndarray[Any, np.dtype[Any]]], fields: Arrays
    ) -> Sequence[float]:
        best_BT = outputs[0].argmax(-1)
        frames = fields["frames"].shape[1]
        # The real positions of each row, as the loss counts them.
        lengths_B = -(-fields["lengths"] * best_BT.shape[1] // frames)
        edits = 0
        for row, length in enumerate(lengths_B.tolist()):
            heard = greedy(best_BT[row, :length])
            edits += edit_distance(heard, fields["targets"][row][fields["counts"][row]].tolist())
        return [float(edits)]

    def value(self, sums: Sequence[float], totals: Totals) -> float:
        return sums[0] / totals.weight


def greedy(best: np.ndarray[Any, np.dtype[Any]]) -> list[int]:
    """Drop repeats, then blanks, of the best output of each position."""
    changed = np.diff(best, prepend=-1) != 0
    found: list[int] = best[changed & (best != 0)].tolist()
    return found


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the fewest insertions, deletions and replacements (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, token in enumerate(one, 1):
        corner, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            replaced = corner + (token != wanted)
            corner = row[place]
            row[place] = min(replaced, corner + 1, row[place - 1] + 1)
    return row[-1]
