"""The state of a run, read once from the files in its folder.

Needs neither torch nor MPI nor the job itself.
"""

import math
import time
import tomllib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.runs.folder import HISTORY, JOB, LOCK, METRICS, RECIPE
from mpillm.runs.history import KILLED, RUNNING, Attempt, attempts, object_at, read_history
from mpillm.runs.lock import Holder, live_holder, modified
from mpillm.runs.metrics import read_metrics
from mpillm.runs.submit import read_job
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

SUBMITTED, UNKNOWN, FINISHED = "submitted", "unknown", "finished"
# Enough steps for a median that one slow step does not move.
RECENT = 50
Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint in the run's folder."""

    folder: Path
    step: int
    bytes: int
    written: float
    """Unix seconds."""


@dataclass(frozen=True)
class RunState:
    """What the files of a run's folder say of it, at one moment."""

    run: Path
    name: str
    now: float
    """The time of reading, in unix seconds."""
    state: str
    """running, finished, stopped, failed, killed (no end on record), submitted, or unknown."""
    reason: str
    holder: str
    """The live holder of the run's lock; empty without one."""
    steps: Columns
    """The metrics of each step, a column a key, NaN where a step has none."""
    evaluations: Columns
    attempts: tuple[Attempt, ...]
    checkpoints: tuple[KeptCheckpoint, ...]
    """The oldest first."""
    recipe: Mapping[str, Any]
    job: Mapping[str, Any]
    """The file of `mpillm submit`; empty where the run was not submitted."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.steps["step"][-1]) if self.steps.get("step") else 0

    @property
    def goal(self) -> int:
        """Steps that the recipe asks for; 0 where that is unknown."""
        steps = object_at(self.recipe, "train").get("steps") or (
            self.attempts[-1].facts.get("steps") if self.attempts else 0
        )
        return steps if isinstance(steps, int) else 0

    @property
    def steps_left(self) -> int:
        return max(0, self.goal - self.step)

    def recent(self, key: str) -> list[float]:
        """Return the finite values of the last steps, of the newest attempt if it has any."""
        first = self.attempts[-1].first_step if self.attempts else 0
        steps, values = self.steps.get("step", ()), self.steps.get(key, ())
        tail = list(zip(steps, values, strict=False))[-RECENT:]
        newest = [value for step, value in tail if step > first and math.isfinite(value)]
        return newest or [value for _, value in tail if math.isfinite(value)]


def read_run(run: Path, now: float | None = None) -> RunState:
    """Read a run's folder, while it trains or after. Raises UsageError for another folder."""
    check_run(run)
    now = time.time() if now is None else now
    metrics = list(read_metrics(run / METRICS))
    steps = columns(line for line in metrics if "validation_loss" not in line)
    evaluations = columns(line for line in metrics if "validation_loss" in line)
    recipe, job = read_recipe(run / RECIPE), read_job(run)
    reached = int(steps["step"][-1]) if steps else 0
    holder, tried = _attempts(run, reached, now)
    if tried and tried[-1].how == KILLED:
        # A job may have begun or ended after the lock was read and before the history was.
        holder, tried = _attempts(run, reached, now)
    state, reason = _state(tried, holder is not None, reached, recipe, job)
    return RunState(
        run,
        run.resolve().name,
        now,
        state,
        reason,
        holder.describe() if holder else "",
        steps,
        evaluations,
        tuple(tried),
        tuple(kept_checkpoints(run)),
        recipe,
        job,
    )


def check_run(run: Path) -> None:
    """Raise UsageError where `run` is not a run's folder, with the folder to name instead."""
    if not run.exists():
        raise UsageError(
            f"there is no folder {run}; name the one that a recipe's train.run names, "
            "such as runs/quickstart"
        )
    if not run.is_dir():
        raise UsageError(
            f"{run} is a file; name the run's folder "
            "(a recipe's train.run, such as runs/quickstart)"
        )
    if (run / INDEX).exists() and run.parent.name == CHECKPOINTS:
        raise UsageError(
            f"{run} is one checkpoint; name the run that it belongs to: {run.parent.parent}"
        )
    if not any((run / name).exists() for name in (METRICS, HISTORY, CHECKPOINTS, RECIPE, JOB)):
        raise UsageError(
            f"{run} is not a run's folder: it holds none of {METRICS}, {HISTORY}, {CHECKPOINTS}/, "
            f"{RECIPE} and {JOB}; name the folder that a recipe's train.run names"
        )


def columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, "array[float]"]:
    """Turn objects into one column a key, with NaN for a missing number.

    Skips lines without a step.
    """
    found: dict[str, array[float]] = {}
    count = 0
    for line in lines:
        if not isinstance(line.get("step"), int):
            continue
        for key, value in line.items():
            column = found.setdefault(key, array("d"))
            _fill(column, count)
            column.append(value if isinstance(value, int | float) else math.nan)
        count += 1
    for column in found.values():
        _fill(column, count)
    return found


def _fill(column: "array[float]", length: int) -> None:
    if len(column) < length:
        column.extend([math.nan] * (length - len(column)))


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the sections of a resolved recipe; empty where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def kept_checkpoints(run: Path) -> list[KeptCheckpoint]:
    """List the checkpoints of a run, the oldest first; skip one that is removed meanwhile."""
    found = []
    for step, folder in checkpoint_folders(run / CHECKPOINTS).items():
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(
                KeptCheckpoint(
                    folder,
                    step,
                    size,
                    (folder / INDEX).stat().st_mtime,
                )
            )
        except OSError:
            continue
    return found


def _attempts(run: Path, reached: int, now: float) -> tuple[Holder | None, list[Attempt]]:
    """Return the live holder of the run, and the attempts at it."""
    holder = live_holder(run)
    sign = now if holder else max(modified(run / LOCK), modified(run / METRICS))
    tried = attempts(
        read_history(run / HISTORY), holder is not None, datetime.fromtimestamp(sign, UTC), reached
    )
    return holder, tried


def _state(
    tried: Sequence[Attempt],
    alive: bool,
    reached: int,
    recipe: Mapping[str, Any],
    job: Mapping[str, Any],
) -> tuple[str, str]:
    """Decide (state, reason)."""
    if tried:
        return tried[-1].how, tried[-1].reason
    if alive:
        return RUNNING, ""
    if reached:
        # An early mpillm wrote metrics and no history.
        return (
            FINISHED if reached >= object_at(recipe, "train").get("steps", math.inf) else UNKNOWN
        ), ""
    return (SUBMITTED if job else UNKNOWN), ""
