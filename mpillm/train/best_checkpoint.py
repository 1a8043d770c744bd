"""The best checkpoint of a run by a metric of its evaluations, and the end of one that stops early.

Both are pure functions of the evaluations so far, which metrics.jsonl holds: a resumed run reads
them there, so that nothing else has to be saved.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_root
from mpillm.errors import RecipeError
from mpillm.runs.metrics import read_metrics
from mpillm.tasks.metrics.metric import Metric
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.train.recipe import TrainSettings

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tasks.task import Task

# They follow from the loss, so an evaluation does not record them.
FROM_LOSS = ("loss", "perplexity", "bits-per-byte")
PREFIX = "validation_"
LOSS, REWARD = f"{PREFIX}loss", f"{PREFIX}reward"


def recorded_name(metric: str) -> str:
    """Return the name of a metric of an evaluation in metrics.jsonl."""
    return PREFIX + metric.replace("-", "_")


def recorded_metrics(metrics: Iterable[Metric]) -> dict[str, bool]:
    """Return the numbers that an evaluation by `metrics` records, each with whether a lower one is
    better.
    """
    own = {
        recorded_name(metric.name): metric.lower_is_better
        for metric in metrics
        if metric.name not in FROM_LOSS and not metric.is_table
    }
    return {LOSS: True, **own}


class BestCheckpoint:
    """Which evaluation is the best so far, and whether `patience` of them in a row were no better.

    All ranks see the same evaluations, so all of them decide alike.
    """

    def __init__(self, settings: TrainSettings, task: "Task", validates: bool) -> None:
        """Check the settings. Raises RecipeError where the task or the data gives no such number.

        `validates`: whether the data has a validation split.
        """
        self.metric = settings.best_metric
        patience = settings.early_stopping_patience
        self._patience = 0 if patience == "none" else patience
        self._since = 0
        self.step, self.value = 0, 0.0
        if not self.metric:
            return
        known = recorded_metrics(make_metrics((*task.metrics, *task.answer_metrics), task.classes))
        if task.writes_answers:
            known[REWARD] = False
        if self.metric not in known:
            raise RecipeError(
                f"train.keep_best = {self.metric!r} is not among the numbers of an evaluation of "
                f"the task {task.name}, which gives {', '.join(known)}"
            )
        if not validates:
            raise RecipeError(
                f"the best checkpoint is that of the best {self.metric}, and the data has no "
                "validation split; prepare it with a larger --validation, or leave "
                "train.keep_best and train.early_stopping_patience out"
            )
        self._lower = known[self.metric]

    def recall(self, path: Path, done: int, comm: "MPI.Intracomm") -> None:
        """Take the evaluations of metrics.jsonl at `path` up to step `done`, the restored one.

        Every rank calls it; rank 0 reads.
        """
        if not (done and self.metric):
            return

        def read() -> list[dict[str, float]]:
            return [line for line in read_metrics(path) if LOSS in line and line["step"] <= done]

        for line in on_root(comm, read):
            self.add(line)

    def describe(self) -> str:
        return f"{self.metric.replace('_', ' ')} {self.value:.4f}"

    def add(self, line: Mapping[str, Any]) -> bool:
        """Take an evaluation, as metrics.jsonl has it; return whether it is the best so far.

        One that ties with the best is no better, nor is one without a finite number.
        """
        if not self.metric:
            return False
        value = line.get(self.metric)
        better = (
            isinstance(value, int | float)
            and math.isfinite(value)
            and (not self.step or (value < self.value if self._lower else value > self.value))
        )
        if not better:
            self._since += 1
            return False
        assert value is not None
        self.step, self.value, self._since = int(line["step"]), float(value), 0
        return True

    @property
    def stops(self) -> str:
        """Why the run stops early, in words; "" where it does not."""
        if not self._patience or self._since < self._patience:
            return ""
        best = f"than {self.value:.4f} at step {self.step:,}" if self.step else "than none"
        count = "evaluation" if self._since == 1 else f"{self._since:,} evaluations in a row"
        return f"stopped early: {count} had no better {self.metric} {best}"
