"""The island axis: its ranks hold the same model, and train alone between two rounds."""

from collections.abc import Mapping
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import BatchAxis, MessageBytes, mean_parameters


class IslandAxis(BatchAxis):
    """The axis whose ranks share the batch, and average their weights once a round."""

    name: ClassVar[str] = "island"
    members: ClassVar[str] = "islands"
    trains_apart: ClassVar[bool] = True

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
        differences = element.difference * mean_parameters(model, sizes)
        return 2 * differences * (islands - 1) / islands
