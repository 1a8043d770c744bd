"""The data axis: every rank holds the same weights and a share of the batch."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import BatchAxis, MessageBytes, RankTimes, mean_parameters


class DataAxis(BatchAxis):
    """The axis whose ranks hold replicas of the weights and share the batch."""

    name: ClassVar[str] = "data"
    shares_tokens: ClassVar[bool] = True
    members: ClassVar[str] = "ranks"
    optional: ClassVar[bool] = False

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        data = sizes[self.name]
        gradients = element.gradient * mean_parameters(model, sizes)
        return element.sends * gradients * (data - 1) / data

    def wait_seconds(self, times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
        # An axis of one rank reduces nothing: the time between the two clock reads is not a wait.
        return float(times.reducing.mean()) if len(groups[0]) > 1 else 0.0
