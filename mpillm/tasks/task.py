"""The base of all tasks: fields of a batch, targets, loss, and metrics of an evaluation.

Nothing outside `tasks` cuts targets out of tokens or computes a loss. A task is one file.

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
    """A task. A run has one object of it, which holds no state."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits-per-byte")
    """Metrics of an evaluation, by their names in the metric catalogue, in order."""

    field_names: ClassVar[tuple[str, ...]]
    """The fields of every batch; `documents` is added where the recipe asks for it."""

    reads_heads: ClassVar[bool] = False
    """Whether the losses take a `LinearHead` in place of its logits, so that these need not exist.

    Logits come where the architecture returns no head, or a metric needs them.
    """

    @abstractmethod
    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        """Make a batch's fields from `raw`, the arrays of the sampler.

        `raw` holds `tokens` (B, T + 1). Where the recipe asks for a document mask it also holds
        `documents` (B, T + 1), each position's document number within its row. The first dim of
        each field counts sequences.
        """

    @abstractmethod
    def loss_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        """Return the loss summed over the targets of `fields`, in nats: a float32 scalar.

        The sum, not the mean: microbatches and ranks may have unequal numbers of targets.
        """

    def objective_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        """Return what training minimises, summed as in `loss_sum`: that loss, unless overridden."""
        return self.loss_sum(outputs, fields)

    @abstractmethod
    def weight(self, fields: Fields) -> float:
        """Count the targets of `fields`: the mean loss is the sum of losses over this number."""

    def fixed_weight(self, rows: int, context: int) -> float | None:
        """Return the weight of any `rows` full sequences, where their shape determines it.

        None: it depends on the data; the ranks then add up the weights of each batch, by one
        message before its passes.
        """
        return None
