"""Metrics of preferences: how often the reward ranks answers rightly, and by how much.

The reward of an answer is β · (log π − log π_ref). A row is one record: a chosen and a rejected
answer, or one of the two; the reward of the other is NaN.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import REWARDS, Array, Arrays, Metric, Totals


class PreferenceAccuracy(Metric):
    """The share of records whose chosen answer has the higher reward than the rejected one.

    An answer alone is compared with the reward 0, that of the reference.
    """

    name: ClassVar[str] = "preference-accuracy"
    title: ClassVar[str] = "preference accuracy"
    output_kinds: ClassVar[tuple[str, ...]] = REWARDS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        rewards_B2 = np.nan_to_num(outputs[0], nan=0.0)
        hits_B: Array = rewards_B2[:, 0] > rewards_B2[:, 1]
        return hits_B[:, None].astype(np.float64)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class RewardMargin(Metric):
    """The mean reward of chosen answers, less that of rejected ones; NaN without either."""

    name: ClassVar[str] = "reward-margin"
    title: ClassVar[str] = "reward margin"
    output_kinds: ClassVar[tuple[str, ...]] = REWARDS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        there_B2 = ~np.isnan(outputs[0])
        return np.concatenate([np.where(there_B2, outputs[0], 0.0), there_B2], 1, dtype=np.float64)

    def value(self, sums: Array, totals: Totals) -> float:
        chosen, rejected, n_chosen, n_rejected = map(float, sums)
        if not (n_chosen and n_rejected):
            return float("nan")
        return chosen / n_chosen - rejected / n_rejected
