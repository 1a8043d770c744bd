"""The score of a model: totals, the value of each metric with its interval, from rows of ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.infer.scores.bootstrap import (
    REPLICATES,
    Interval,
    draw_all,
    draw_weights,
    percentile_interval,
)
from mpillm.infer.scores.exact_sums import ExactSums, OwnRows
from mpillm.tasks.metrics.likelihood import Perplexity
from mpillm.tasks.metrics.metric import Array, Metric, Totals

if TYPE_CHECKING:
    from mpi4py import MPI

NO_SUMS = np.empty(0)
# Of the sums of some replicates at once.
BLOCK_BYTES = 64 << 20
# Ahead of the statistics of metrics, each row has its loss and its weight.
TOTALS = 2


@dataclass(frozen=True)
class Score:
    """The totals of an evaluation and the values of its metrics, in order.

    A value is None where its metric needs the model's outputs and there were none.
    """

    totals: Totals
    values: Mapping[str, float | None]
    rows: int = 0
    """The rows that were scored."""
    intervals: Mapping[str, Interval | None] = field(default_factory=dict)
    """The 95% interval of each metric, where intervals were asked for; None: too few rows."""
    tables: Mapping[str, list[list[float]]] = field(default_factory=dict)
    """The counts of metrics that are tables."""
    signatures: Mapping[str, str] = field(default_factory=dict)
    """The settings and releases by which texts were compared, where a metric has one."""
    replicates: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)
    """The values (R,) of each metric in the replicates of the bootstrap."""

    @classmethod
    def from_totals(cls, totals: Totals, metrics: Sequence[Metric]) -> "Score":
        """Score a model that gives only the likelihood of the text, such as a baseline."""
        return cls(
            totals,
            {
                metric.name: metric.value(NO_SUMS, totals) if metric.needs_totals_alone else None
                for metric in metrics
            },
        )

    @property
    def loss(self) -> float:
        return self.totals.loss

    @property
    def perplexity(self) -> float:
        return Perplexity().value(NO_SUMS, self.totals)

    def record(self) -> dict[str, object]:
        """Return what a run's folder keeps of it: see runs/evaluations.py."""
        return {
            "rows": self.rows,
            "values": dict(self.values),
            "intervals": dict(self.intervals),
            "tables": dict(self.tables),
        }

    def to_json(self) -> dict[str, object]:
        values = {name.replace("-", "_"): value for name, value in self.values.items()}
        intervals = {name.replace("-", "_"): each for name, each in self.intervals.items()}
        return {
            "loss": self.loss,
            "tokens": int(self.totals.weight),
            "text_bytes": int(self.totals.text_bytes),
            **values,
            "rows": self.rows,
            "intervals": intervals,
            **({"signatures": dict(self.signatures)} if self.signatures else {}),
            **{name.replace("-", "_"): counts for name, counts in self.tables.items()},
        }


def score_rows(
    own: Sequence[OwnRows],
    widths: Sequence[int],
    metrics: Sequence[Metric],
    comm: "MPI.Intracomm",
    *,
    rows: int,
    text_bytes: int = 0,
    intervals: bool = True,
) -> Score:
    """Score rows by `metrics`. Every rank calls it with its own rows, and gets the same score.

    `widths`: the statistics of each metric, side by side after the loss and the weight of a row; of
    a rank without rows empty. `rows`: those of all ranks. `text_bytes`: of their text. Without
    `intervals` there is no bootstrap.
    """
    sums = ExactSums(own, comm)
    spans = _spans(max(comm.allgather(tuple(widths)), key=len), metrics)
    whole_K = sums.whole() if sums.width else np.zeros(TOTALS)
    totals = Totals(float(whole_K[0]), float(whole_K[1]), text_bytes)
    if not totals.weight:
        return Score(totals, {}, rows)
    ranked = {m: span for m, span in spans.items() if m.needs_all_rows}
    summed = {m: span for m, span in spans.items() if not m.needs_all_rows}
    all_rows = score_all_rows(own, ranked, comm, intervals)
    values = _values(whole_K, totals, summed) | {name: each[0] for name, each in all_rows.items()}
    # In the order of the metrics.
    values = {m.name: values[m.name] for m in metrics if m.name in values}
    tables = {m.name: m.table(whole_K[span]) for m, span in spans.items() if m.is_table}
    if not intervals:
        return Score(totals, values, rows, tables=tables)
    replicates = _replicates(sums, totals, summed)
    replicates |= {name: each[1] for name, each in all_rows.items()}
    bounds = {name: percentile_interval(each) for name, each in replicates.items()}
    return Score(totals, values, rows, bounds, tables, replicates=replicates)


def score_all_rows(
    own: Sequence[OwnRows],
    spans: Mapping[Metric, slice],
    comm: "MPI.Intracomm",
    intervals: bool,
) -> dict[str, tuple[float, Array]]:
    """Compute metrics of all rows together: their values, and those of the replicates.

    Rank 0 computes, with the rows in the order of their numbers. Every rank calls it.
    """
    if not spans:
        return {}
    parts = [(each.numbers_B, each.statistics.table) for each in own]
    every = comm.gather(parts)

    def compute() -> dict[str, tuple[float, Array]]:
        numbers_N, rows_NK = (
            np.concatenate(column)
            for column in zip(*(part for rank in every or [] for part in rank), strict=True)
        )
        order = np.argsort(numbers_N)
        rows_NK = rows_NK[order]
        draws_RN = np.ones((1, len(order)), np.uint8)
        if intervals:
            draws_RN = np.concatenate([draws_RN, draw_all(numbers_N[order])])
        found = {m.name: m.values_of_rows(rows_NK[:, span], draws_RN) for m, span in spans.items()}
        return {name: (float(values[0]), values[1:]) for name, values in found.items()}

    return on_root(comm, compute)


def _spans(widths: Sequence[int], metrics: Sequence[Metric]) -> dict[Metric, slice]:
    """Return where the statistics of each metric are; of one that needs none, an empty slice."""
    left, spans, first = iter(widths), {}, TOTALS
    for metric in metrics:
        width = 0 if metric.needs_totals_alone else next(left, 0)
        spans[metric] = slice(first, first + width)
        first += width
    return spans


def _values(sums_K: Array, totals: Totals, spans: Mapping[Metric, slice]) -> dict[str, float]:
    return {
        metric.name: metric.value(sums_K[span], totals)
        for metric, span in spans.items()
        if not metric.is_table
    }


def _replicates(sums: ExactSums, totals: Totals, spans: Mapping[Metric, slice]) -> dict[str, Array]:
    """Compute the metrics of each replicate, (R,); NaN where it has no target that counts."""
    found: dict[str, list[float]] = {m.name: [] for m in spans if not m.is_table}
    block = max(1, min(REPLICATES, BLOCK_BYTES // (8 * sums.width)))
    for first in range(0, REPLICATES, block):
        stop = min(first + block, REPLICATES)
        weights_of = partial(_drawn, first, stop)
        for sums_K in sums.weighted(weights_of, stop - first):
            # The bytes of a row are not known: those of a target are taken as alike.
            text_bytes = totals.text_bytes * float(sums_K[1]) / totals.weight
            drawn = Totals(float(sums_K[0]), float(sums_K[1]), text_bytes)
            none = dict.fromkeys(found, math.nan)
            for name, value in (_values(sums_K, drawn, spans) if drawn.weight else none).items():
                found[name].append(value)
    return {name: np.array(each) for name, each in found.items()}


def _drawn(first: int, stop: int, numbers_B: Array) -> Array:
    """Draw the weights of the replicates `first` to `stop` - 1."""
    return draw_weights(numbers_B, stop)[first:]
