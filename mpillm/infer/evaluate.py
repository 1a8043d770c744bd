"""Evaluate a model over a whole split by the task's metrics, its batches shared by the ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mpillm.errors import DataError
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.spec import ModelSpec
from mpillm.parallel.pipeline.stage import BatchScore, OfBatch, ScoringStage
from mpillm.parallel.step_plan import Precision
from mpillm.plan.peak_memory import rows_at_once
from mpillm.system.console import Console
from mpillm.tasks.metrics.likelihood import Perplexity
from mpillm.tasks.metrics.metric import Metric, Totals
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task import Task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.samples import RowShape, SampleReader

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Score:
    """The totals of an evaluation and the values of its metrics, in order.

    A value is None where its metric needs the model's outputs and there were none.
    """

    totals: Totals
    values: Mapping[str, float | None]

    @classmethod
    def from_totals(cls, totals: Totals, metrics: Sequence[Metric]) -> "Score":
        """Score a model that gives only the likelihood of the text, such as a baseline."""
        return cls(
            totals,
            {
                metric.name: metric.value((), totals) if metric.needs_totals_alone else None
                for metric in metrics
            },
        )

    @property
    def loss(self) -> float:
        return self.totals.loss

    @property
    def perplexity(self) -> float:
        return Perplexity().value((), self.totals)

    def to_json(self) -> dict[str, float | None]:
        values = {name.replace("-", "_"): value for name, value in self.values.items()}
        return {
            "loss": self.loss,
            "tokens": int(self.totals.weight),
            "text_bytes": self.totals.text_bytes,
            **values,
        }


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
        metrics: Sequence[OfBatch] = (),
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
        metrics: Sequence[OfBatch] = (),
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
) -> Score:
    """Score all rows of the split: of causal LM, each token but the first.

    `names`: the metrics; none: the task's. Every rank calls it and gets the same score: the
    batches are the same at any number of ranks, and their sums are added exactly. Raises DataError
    where no target counts.
    """
    spec, task = scorer.spec, scorer.task
    metrics = make_metrics(names or task.metrics)
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
            [metric.of_batch for metric in metrics if not metric.needs_totals_alone],
        )
    counted = [score for number, score in scores.items() if number < own]
    every = [score for part in comm.allgather(counted) for score in part]
    totals = Totals(
        math.fsum(score.loss_sum for score in every),
        math.fsum(score.weight for score in every),
        reader.n_bytes,
    )
    if not totals.weight:
        raise DataError(
            "the validation split has no target that counts, so its loss has no mean; prepare it "
            "with a larger --validation, or check the data and the task"
        )
    # Batch by batch for each metric that needs the outputs, in the order of `metrics`.
    by_metric = iter(zip(*(score.sums for score in every), strict=True))
    values = {}
    for metric in metrics:
        of_batches = () if metric.needs_totals_alone else next(by_metric)
        sums = [math.fsum(column) for column in zip(*of_batches, strict=True)]
        values[metric.name] = metric.value(sums, totals)
    return Score(totals, values)
