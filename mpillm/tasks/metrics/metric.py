"""The base of all metrics: statistics of each row, and a value from their sums over all rows.

Shapes: B rows of a batch, k statistics of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
# The outputs that some metrics read: see `Metric.output_kinds`.
CLASSES = ("a class of each row", "a class of each position")
SETS = ("a set of classes of each row",)
TOKENS = ("next tokens", "next tokens of a target", "hidden tokens")
NUMBERS = ("a number of each row",)
REWARDS = ("rewards of answers",)


@dataclass(frozen=True)
class Totals:
    """The counts of every evaluation, over all rows of all ranks."""

    loss_sum: float
    """In nats."""
    weight: float
    """Targets: the sum of `Task.weight`."""
    text_bytes: float
    """Bytes of the text that was scored; 0 where it is not known."""

    @property
    def loss(self) -> float:
        """The mean loss of a target, in nats."""
        return self.loss_sum / self.weight


class Metric(ABC):
    """A metric. Its objects hold no state: ranks add up sums, so their number is irrelevant.

    A row is what the data has many of, such as a sentence with its class, or a window of text. An
    interval is that of a bootstrap over rows, so each row has statistics of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The head of its column in a table."""
    digits: ClassVar[int] = 4

    sums_positions: ClassVar[bool] = False
    """Whether a row's statistics are sums over its positions, in any order.

    Ranks can then share the positions of a sequence.
    """

    output_kinds: ClassVar[tuple[str, ...]] = ()
    """What it reads, as `Task.metric_kind` names it: other tasks are refused; (): any task."""

    lower_is_better: ClassVar[bool] = False
    """Whether a smaller value is a better one, as of a loss or an error."""

    needs_all_rows: ClassVar[bool] = False
    """Whether its value comes of the statistics of all rows together (`values_of_rows`), such as
    their order, and not of sums.
    """

    table_columns: ClassVar[tuple[str, ...]] = ()
    """The heads of a table's columns; (): a line and a column for each class."""

    is_table: ClassVar[bool] = False
    """Whether its figures are those of `table`, in place of one value."""

    @classmethod
    def make(cls, classes: Sequence[str] = ()) -> Self:
        """Make the metric of a task whose classes have these names, in the order of their numbers.

        Raises UsageError where it does not fit them.
        """
        return cls()

    @property
    def needs_totals_alone(self) -> bool:
        """Whether `of_rows` is not overridden: then a model that gives only a likelihood has a
        value too.
        """
        # Compared as functions of the classes: no flag that an author could forget to set.
        return type(self).of_rows is Metric.of_rows

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        """Return the statistics of each row of a batch, (B, k), the same k for each batch.

        The first dim of outputs and fields counts rows. None (k = 0) where `Totals` are enough.
        """
        return np.empty((len(outputs[0]), 0))

    @abstractmethod
    def value(self, sums: Array, totals: Totals) -> float:
        """Compute the metric from the statistics (k,) summed over rows: a pure function.

        It is called for all rows, and for each replicate of the bootstrap, which may lack some.
        """

    def values_of_rows(self, rows_NK: Array, draws_RN: Array) -> Array:
        """Compute a metric that `needs_all_rows`, (R,), from the statistics of N rows in order.

        `draws_RN`: how often each of R replicates has each row. One rank calls it.
        """
        raise NotImplementedError(f"the metric {self.name} is of sums")

    def table(self, sums: Array) -> list[list[float]]:
        """Return the counts of a metric that is a table."""
        raise NotImplementedError(f"the metric {self.name} is no table")


def row_sums(values_BT: Array) -> Array:
    """Sum the values of each row over its other dims: a column of statistics, (B, 1)."""
    sums: Array = values_BT.reshape(len(values_BT), -1).sum(1, dtype=np.float64, keepdims=True)
    return sums


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of B rows, (B, width), without the columns that are 0 in all of them.

    A batch has few of a thousand classes: only those take memory.
    """

    width: int
    columns_U: Array
    values_BU: Array

    @property
    def rows(self) -> int:
        return len(self.values_BU)

    @property
    def table(self) -> Array:
        """All columns, (B, width)."""
        whole = np.zeros((self.rows, self.width))
        whole[:, self.columns_U] = self.values_BU
        return whole

    @classmethod
    def joined(cls, tables: Sequence[Array]) -> "RowStatistics":
        """Put tables (B, k) of the same rows side by side."""
        whole = np.concatenate([np.asarray(table, np.float64) for table in tables], axis=1)
        # NaN is not 0, so it stays.
        columns = np.flatnonzero((whole != 0).any(0))
        return cls(whole.shape[1], columns, whole[:, columns])
