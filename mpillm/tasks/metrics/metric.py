"""The base of all metrics: sums over batches, and a value from the sums of all ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class Totals:
    """The counts of every evaluation, over all batches of all ranks."""

    loss_sum: float
    """In nats."""
    weight: float
    """Targets: the sum of `Task.weight`."""
    text_bytes: int
    """Bytes of the text that was scored; 0 where it is not known."""

    @property
    def loss(self) -> float:
        """The mean loss of a target, in nats."""
        return self.loss_sum / self.weight


class Metric(ABC):
    """A metric. Its objects hold no state: ranks exchange sums, so their number is irrelevant."""

    name: ClassVar[str]
    title: ClassVar[str]
    """The head of its column in a table."""
    digits: ClassVar[int] = 4

    sums_positions: ClassVar[bool] = False
    """Whether the sums of `of_batch` are those of its positions, added up in any order.

    Ranks can then share the positions of a sequence.
    """

    @property
    def needs_totals_alone(self) -> bool:
        """Whether `of_batch` is not overridden: then a model that gives only a likelihood has a
        value too.
        """
        # Compared as functions of the classes: no flag that an author could forget to set.
        return type(self).of_batch is Metric.of_batch

    def of_batch(
        self, outputs: Sequence[np.ndarray[Any, np.dtype[Any]]], fields: Arrays
    ) -> Sequence[float]:
        """Return this batch's sums, of the same length for each batch; none where `Totals` are
        enough.
        """
        return ()

    @abstractmethod
    def value(self, sums: Sequence[float], totals: Totals) -> float:
        """Compute the metric from the sums over all batches."""
