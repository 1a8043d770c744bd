"""What training and evaluation ask of a split: rows of raw arrays. Tokens and pairs offer them.

A row is a pure function of (seed, step) in training, and of its number in evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from mpillm.tasks.vocabulary import Lengths

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

RawRows = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class RowShape:
    """The shape of a row: `tokens` of a dataset of tokens, `lengths` of a padded pair.

    `documents`: with the number of each position's document.
    """

    tokens: int
    lengths: Lengths
    documents: bool = False

    @classmethod
    def of(cls, task: "Task", lengths: Lengths, documents: bool = False) -> "RowShape":
        return cls(task.row_tokens(lengths), lengths, documents)


class StepSamples(Protocol):
    """The rows of a training run."""

    def raw(self, step: int, first: int, count: int) -> RawRows:
        """Read the rows `first` … `first` + `count` - 1 of the global batch of `step`.

        Any rank may call it for any rows, in any order. Raises DataError.
        """


class EvaluationSamples(Protocol):
    """The batches of an evaluation: all rows of a split, in order."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """The rows of each batch, and the tokens of each row."""

    def raw(self, number: int) -> RawRows:
        """Read the arrays of batch `number`. Raises DataError."""


class SampleReader(Protocol):
    """An open split of a dataset."""

    @property
    def n_bytes(self) -> int:
        """The bytes of text of the split; 0 where there is none."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def steps(self, row: RowShape, batch: int, seed: int) -> StepSamples:
        """Order the rows of a training run, `batch` a step. Raises DataError."""

    def evaluation(self, row: RowShape, rows: int) -> EvaluationSamples:
        """Cut the split into batches of `rows` rows. Raises DataError."""

    def describe(self, row: RowShape, samples: int) -> str:
        """Say how much there is, and how often `samples` rows pass over it."""

    def describe_cuts(self, row: RowShape) -> str:
        """Say how many pairs are longer than a row, whose ends are cut off; "" for none."""
