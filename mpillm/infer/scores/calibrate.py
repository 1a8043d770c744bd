"""Fit a temperature by which a classifier's logits are divided (Guo et al. 2017).

Shapes: N rows, V classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpillm.errors import DataError, UsageError
from mpillm.infer.evaluate import Scorer, collect_rows
from mpillm.infer.scores.bootstrap import SEED
from mpillm.system.console import Console
from mpillm.tasks.metrics.calibration import CalibrationError
from mpillm.tasks.metrics.metric import Array, Arrays, Totals
from mpillm.tasks.row_draws import row_draws
from mpillm.tasks.task import Task
from mpillm.tokens.order import task_keys
from mpillm.tokens.samples import SampleReader

if TYPE_CHECKING:
    from mpi4py import MPI

# A temperature of 0.01 to 100. 60 halvings are more than the digits of a float64.
LEAST, MOST, HALVINGS = 0.01, 100.0, 60
LEAST_ROWS = 20


@dataclass(frozen=True)
class Calibration:
    """A temperature, fitted on half of the rows, and the ECE of the others."""

    temperature: float
    ece_before: float
    ece_after: float
    rows: int
    """The rows that the errors are of."""

    def describe(self) -> str:
        return (
            f"temperature {self.temperature:.4f}, fitted on one half of the rows; on the other "
            f"half, {self.rows:,} rows, the ECE is {self.ece_before:.4f} before and "
            f"{self.ece_after:.4f} after"
        )


def check_calibrates(task: Task) -> None:
    """Raise UsageError for a task that gives no class of each row."""
    if task.output_kind != "a class of each row":
        raise UsageError(
            f"--calibrate fits the probabilities of classes, and the task {task.name} gives "
            f"{task.output_kind}; leave it out"
        )


def calibrate(
    scorer: Scorer, reader: SampleReader, comm: "MPI.Intracomm", console: Console
) -> Calibration:
    """Fit the temperature of a classifier of rows. Every rank calls it and gets the same one.

    The halves are drawn by the numbers of rows. Raises DataError where there are too few rows.
    """
    own, _, _ = collect_rows(scorer, reader, comm, console, [_logits_and_targets])
    tables = [(each.numbers_B, each.statistics.table) for each in own]
    every = sorted((part for rank in comm.allgather(tables) for part in rank), key=_first_number)
    rows = np.concatenate([whole for _, whole in every])
    # After the loss and the weight of each row.
    targets_N, logits_NV = rows[:, 2].astype(np.int64), rows[:, 3:]
    if len(rows) < LEAST_ROWS:
        raise DataError(
            f"--calibrate fits one half of the validation rows and tests the other, and there are "
            f"{len(rows)}; prepare the data with a larger --validation, {LEAST_ROWS} at least"
        )
    # By chance: rows may alternate between classes.
    fitted_N = row_draws(task_keys(SEED, np.arange(len(rows))), 1)[:, 0] < 0.5
    temperature = fit_temperature(logits_NV[fitted_N], targets_N[fitted_N])
    tested_NV, wanted_N = logits_NV[~fitted_N], targets_N[~fitted_N]
    before, after = (_ece(tested_NV / t, wanted_N) for t in (1.0, temperature))
    return Calibration(temperature, before, after, len(wanted_N))


def fit_temperature(logits_NV: Array, targets_N: Array) -> float:
    """Find the temperature of the least cross-entropy, between 0.01 and 100.

    The cross-entropy is convex in 1 / temperature, so its slope has one zero at most.
    """
    own_N = logits_NV[np.arange(len(targets_N)), targets_N]
    low, high = 1 / MOST, 1 / LEAST
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low * high))
        powers_NV = np.exp(middle * (logits_NV - logits_NV.max(1, keepdims=True)))
        expected_N = (powers_NV * logits_NV).sum(1) / powers_NV.sum(1)
        if (expected_N - own_N).mean() > 0:
            high = middle
        else:
            low = middle
    return 1 / float(np.sqrt(low * high))


def _first_number(part: tuple[Array, Array]) -> int:
    return int(part[0][0])


def _logits_and_targets(outputs: Sequence[Array], fields: Arrays) -> Array:
    return np.concatenate([fields["targets"][:, None], outputs[0]], 1, dtype=np.float64)


def _ece(logits_NV: Array, targets_N: Array) -> float:
    metric = CalibrationError()
    sums = metric.of_rows([logits_NV], {"targets": targets_N}).sum(0)
    return metric.value(sums, Totals(0.0, float(len(targets_N)), 0))
