"""The data axis: every rank holds the same weights and a share of the batch."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes, ParallelAxis, RankTimes


class DataAxis(ParallelAxis):
    """The axis whose ranks hold replicas of the weights and share the batch."""

    name: ClassVar[str] = "data"
    shares_tokens: ClassVar[bool] = True
    shares_batch: ClassVar[bool] = True
    optional: ClassVar[bool] = False

    def shares(self, model: ModelSpec, batch: int) -> str:
        return f"a batch of {batch} sequences"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if batch % size == 0:
            return ""
        return f"a global batch of {batch} sequences cannot be shared by {size} ranks"

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        data = sizes[self.name]
        shares = sizes.get("pipeline", 1) * sizes.get("tensor", 1)
        gradients = element.gradient * model.parameters / shares
        return element.sends * gradients * (data - 1) / data

    def wait_seconds(self, times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
        # An axis of one rank reduces nothing: the time between the two clock reads is not a wait.
        return float(times.reducing.mean()) if len(groups[0]) > 1 else 0.0
