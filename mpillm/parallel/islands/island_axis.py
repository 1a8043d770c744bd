"""The island axis: its ranks hold the same model, and train alone between two rounds."""

from collections.abc import Mapping
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes, ParallelAxis


class IslandAxis(ParallelAxis):
    """The axis whose ranks share the batch, and average their weights once a round."""

    name: ClassVar[str] = "island"
    shares_batch: ClassVar[bool] = True
    trains_apart: ClassVar[bool] = True

    def shares(self, model: ModelSpec, batch: int) -> str:
        return f"a batch of {batch} sequences"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if batch % size == 0:
            return ""
        return f"a global batch of {batch} sequences cannot be shared by {size} islands"

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        """Count the all-reduce of a round, as its share of a step."""
        # As of a ring (Patarasuk & Yuan 2009): each rank sends what it holds about twice.
        islands = sizes.get(self.name, 1)
        shares = sizes.get("pipeline", 1) * sizes.get("tensor", 1)
        differences = element.difference * model.parameters / shares
        return 2 * differences * (islands - 1) / islands
