"""What is learnt from a batch: the seam through which every task comes in.

A task turns the raw arrays of samples into the fields of a batch, computes the loss from the model's outputs, and names
the metrics of its evaluation. Nothing outside `tasks` cuts targets out of tokens or calls a loss. One task is one file.

Shapes: B sequences, T positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

RawArrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
Fields = Mapping[str, Tensor]


class Task(ABC):
    """One object a run, without state."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits-per-byte")
    """What an evaluation reports, by names of the metric catalogue, in order."""

    field_names: ClassVar[tuple[str, ...]]
    """The fields that every batch has; `documents` come on top where the recipe asks for them."""

    @abstractmethod
    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        """Make a batch's fields from `raw`, the arrays of the sampler; the first dim of each field counts sequences.

        `raw` holds `tokens` (B, T + 1), and `documents` (B, T + 1), each position's document number within its row,
        where the recipe asks for it.
        """

    @abstractmethod
    def loss_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        """Return the loss summed over the targets of `fields`, in nats: a float32 scalar.

        The sum, not the mean: microbatches and ranks may have unequal numbers of targets.
        """

    @abstractmethod
    def weight(self, fields: Fields) -> float:
        """Count the targets of `fields`: what the sum of their losses is divided by to give the mean."""

    def fixed_weight(self, rows: int, context: int) -> float | None:
        """Return the weight of any `rows` full sequences where it follows from the shape alone.

        None: it depends on the data. Then the ranks add up the weights of each batch by one message before its passes.
        """
        return None
