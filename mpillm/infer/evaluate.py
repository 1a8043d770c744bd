"""Evaluate a model over a whole split by the task's metrics, its batches shared by the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpillm.errors import DataError
from mpillm.infer.scores.exact_sums import OwnRows
from mpillm.infer.scores.score import Score, score_rows
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.spec import ModelSpec
from mpillm.parallel.pipeline.stage import BatchScore, OfRows, ScoringStage
from mpillm.parallel.step_plan import Precision
from mpillm.plan.peak_memory import rows_at_once
from mpillm.system.console import Console
from mpillm.tasks.metrics.metric_catalog import check_metrics, make_metrics
from mpillm.tasks.task import Task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.samples import RowShape, SampleReader

if TYPE_CHECKING:
    from mpi4py import MPI


class Scorer(Protocol):
    """A model that can be scored, whole or in stages."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def task(self) -> Task: ...

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this rank takes share i of n of the batches; the stages of one model take one."""

    @property
    def alike(self) -> bool:
        """Whether all ranks must score equally many batches."""

    def score(
        self,
        count: int,
        read: Callable[[int], Fields],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
        metrics: Sequence[OfRows] = (),
    ) -> dict[int, BatchScore]:
        """Score each of `count` batches; the results are on the rank that computes the loss.

        `read(number)` gives the fields of a batch of `shape_of(number)` = (B, T). `done` is called
        once a batch, on some rank.
        """


@dataclass(frozen=True)
class WholeModel:
    """Each rank of `comm` has all of the model."""

    model: PartModule
    task: Task
    comm: "MPI.Intracomm"
    precision: Precision = field(default_factory=Precision)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def share(self) -> tuple[int, int]:
        return self.comm.rank, self.comm.size

    @property
    def alike(self) -> bool:
        return False

    def score(
        self,
        count: int,
        read: Callable[[int], Fields],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
        metrics: Sequence[OfRows] = (),
    ) -> dict[int, BatchScore]:
        stage = ScoringStage(self.model, self.task, self.precision, read, done, metrics)
        for number in range(count):
            stage.forward(number, ())
        return stage.scores


def evaluate(
    scorer: Scorer,
    reader: SampleReader,
    comm: "MPI.Intracomm",
    console: Console,
    names: Sequence[str] = (),
    intervals: bool = False,
) -> Score:
    """Score all rows of the split: of causal LM, each token but the first.

    `names`: the metrics; none: the task's. `intervals`: by a bootstrap over rows. Every rank calls
    it and gets the same score: the batches are the same at any number of ranks, and the statistics
    of their rows are added exactly. Raises DataError where no target counts,
    UsageError for a metric that does not fit the task.
    """
    task = scorer.task
    check_metrics(names, task.name, task.metric_kind or task.output_kind)
    metrics = make_metrics(names or task.metrics, task.classes)
    reading = [metric.of_rows for metric in metrics if not metric.needs_totals_alone]
    own, widths, rows = collect_rows(scorer, reader, comm, console, reading)
    score = score_rows(
        own, widths, metrics, comm, rows=rows, text_bytes=reader.n_bytes, intervals=intervals
    )
    if not score.totals.weight:
        raise DataError(
            "the validation split has no target that counts, so its loss has no mean; prepare it "
            "with a larger --validation, or check the data and the task"
        )
    return score


def collect_rows(
    scorer: Scorer,
    reader: SampleReader,
    comm: "MPI.Intracomm",
    console: Console,
    reading: Sequence[OfRows],
) -> tuple[list[OwnRows], tuple[int, ...], int]:
    """Compute the statistics of all rows of the split by `reading`, after their loss and weight.

    Returns this rank's rows, the number of statistics of each of `reading`, and the number of rows
    of all ranks. The second is empty on a rank without rows. Every rank calls it.
    """
    spec, task = scorer.spec, scorer.task
    samples = reader.evaluation(RowShape.of(task, Lengths.of(spec)), rows_at_once(spec))
    share, shares = scorer.share
    batches = len(samples.shapes)
    own = len(range(share, batches, shares))
    # Where ranks need each other, those with a batch less repeat one, which does not count.
    scored = -(-batches // shares) if scorer.alike else own
    mine = [min(share + number * shares, batches - 1) for number in range(scored)]

    def shape_of(number: int) -> tuple[int, int]:
        rows, tokens = samples.shapes[mine[number]]
        return rows, task.positions(tokens)

    with console.progress("evaluate", len(mine), "batches") as progress:
        scores = scorer.score(
            len(mine),
            lambda number: task.fields(samples.raw(mine[number])),
            shape_of,
            progress.advance,
            reading,
        )
    *firsts, rows = accumulate((rows for rows, _ in samples.shapes), initial=0)
    counted = {number: score for number, score in scores.items() if number < own}
    found = [
        OwnRows(np.arange(each.rows.rows) + firsts[mine[number]], each.rows)
        for number, each in counted.items()
    ]
    return found, next((each.widths for each in counted.values()), ()), rows
