"""The base of all parallelisms: an axis of the mesh over which a training step is spread.

Sizes, legality, traffic, waits, and the ranks that count a loss or a weight are loops over the axis
objects of axis_sizes.AXES. A new axis is a file and an entry there. Needs neither MPI nor torch.
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
    """The times of one step: arrays by rank, in seconds of one clock."""

    begins: Floats
    ends: Floats
    busy: Floats
    """Seconds of computing between begin and end."""
    reducing: Floats
    """Seconds of reducing gradients after the last pass: with overlap, the exposed part alone."""

    def window(self, ranks: Sequence[int]) -> float:
        """Return the seconds from the first pass of `ranks` to their last."""
        return float(self.ends[list(ranks)].max() - self.begins[list(ranks)].min())


@dataclass(frozen=True)
class MessageBytes:
    """Bytes of an element in messages, and what chooses messages."""

    stream: int = 4
    """Of a stream between stages, and of its gradient."""
    gradient: float = 4.0
    """Of a weight's gradient, over all weights: frozen ones have none."""
    sends: float = 2.0
    """How often a rank sends the gradients of what it holds, or the values: twice in an all-reduce
    (Patarasuk & Yuan 2009).
    """
    difference: float = 4.0
    """Of a weight in the rounds of islands, over the steps of a round."""
    context_kind: str = "auto"
    """How the ranks of a context axis attend, as in the settings."""
    device: str = "cpu"


class ParallelAxis(ABC):
    """A kind of parallelism as an axis of the mesh. Its objects hold no state."""

    name: ClassVar[str]
    """The axis's name in the mesh, and its key in the recipe's section [parallel]."""
    cuts_weights: ClassVar[bool] = False
    """Whether its ranks hold different weights.

    Otherwise each weight is replicated along the axis, and counts once in a norm.
    """
    repeats_loss: ClassVar[bool] = False
    """Whether its ranks compute the same losses; then those of coordinate 0 alone count."""
    shares_tokens: ClassVar[bool] = False
    """Whether its ranks compute different tokens of a batch with the same weights.

    Gradients are then summed along it.
    """
    shares_batch: ClassVar[bool] = False
    """Whether its ranks compute different sequences of a batch."""
    trains_apart: ClassVar[bool] = False
    """Whether its ranks may hold other weights than each other for some steps.

    Norms are then those of one coordinate. It is the outermost axis of the mesh.
    """
    optional: ClassVar[bool] = True
    """Whether the mesh leaves it out where its size is 1."""

    def wanted(self, settings: ParallelSettings) -> int:
        """Return the size that the recipe asks for; 0: what the other axes leave."""
        # The key of the section [parallel] has the name of the axis.
        size = getattr(settings, self.name)
        return 0 if size == "auto" else int(size)

    @abstractmethod
    def shares(self, model: ModelSpec, batch: int) -> str:
        """Name the work that the ranks share, with its amount: `a batch of 8 sequences`."""

    @abstractmethod
    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        """Return why `size` ranks cannot share the work; "" where they can."""

    @abstractmethod
    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        """Estimate the bytes that a rank sends along the axis a step; `chunks`: stages a rank."""

    def wait_seconds(self, times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
        """Return the mean wait of a rank along the axis.

        `groups`: lists of ranks that differ along this axis alone.
        """
        return 0.0


class BatchAxis(ParallelAxis):
    """The base of axes whose ranks compute different sequences of a batch."""

    shares_batch: ClassVar[bool] = True
    members: ClassVar[str]
    """What a message calls those that share the batch."""

    def shares(self, model: ModelSpec, batch: int) -> str:
        return f"a batch of {batch} sequences"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if batch % size == 0:
            return ""
        return f"a global batch of {batch} sequences cannot be shared by {size} {self.members}"


def mean_parameters(model: ModelSpec, sizes: Mapping[str, int]) -> float:
    """Return how many parameters a rank of a mesh of `sizes` holds, the mean over the ranks."""
    return model.parameters / (sizes.get("pipeline", 1) * sizes.get("tensor", 1))
