"""An axis of the mesh along which a training step is spread: the seam through which every parallelism comes in.

Sizes, legality, traffic, waits, and which ranks count a loss or a weight are loops over axis objects (axis_sizes.AXES).
Nothing counts to two: a third axis adds its file and its entry there. Needs neither MPI nor torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpillm.models.spec import ModelSpec
from mpillm.parallel.settings import ParallelSettings

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class RankTimes:
    """When each rank computed in one step, by rank, in seconds on one clock."""

    begins: Floats
    ends: Floats
    busy: Floats
    """Seconds of computing between begin and end."""
    reducing: Floats
    """Seconds of reducing gradients after the last pass: with overlap, the exposed part alone."""

    def window(self, ranks: Sequence[int]) -> float:
        """Return the seconds from the first pass of `ranks` to their last."""
        return float(self.ends[list(ranks)].max() - self.begins[list(ranks)].min())


class ParallelAxis(ABC):
    """One kind of parallelism as the mesh sees it. One object, without state."""

    name: ClassVar[str]
    """The axis's name in the mesh, and its key in the recipe's section [parallel]."""
    cuts_weights: ClassVar[bool] = False
    """Whether its ranks hold different weights; else each weight is replicated along it and counts once in a norm."""
    repeats_loss: ClassVar[bool] = False
    """Whether its ranks compute the same losses; then the losses of coordinate 0 alone count."""

    def wanted(self, settings: ParallelSettings) -> int:
        """Return the size that the recipe asks for; 0: whatever the other axes leave."""
        size = getattr(settings, self.name)
        return 0 if size == "auto" else int(size)

    @abstractmethod
    def shares(self, model: ModelSpec, batch: int) -> str:
        """Name what the axis's ranks share, with its number: `a batch of 8 sequences`."""

    @abstractmethod
    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        """Say why `size` ranks cannot share it; "" where they can."""

    @abstractmethod
    def traffic_bytes(
        self, sizes: Mapping[str, int], model: ModelSpec, batch: int, chunks: int
    ) -> float:
        """Estimate the bytes that a rank sends along the axis in a step; `chunks`: stages a rank."""

    def wait_seconds(self, times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
        """Return a rank's mean wait along the axis; `groups`: the ranks that differ along it alone."""
        return 0.0
