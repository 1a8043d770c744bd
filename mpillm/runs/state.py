"""Where a run stands, from the files in its folder alone: read once, without torch, MPI or the job's help."""

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
from mpillm.runs.history import KILLED, RUNNING, Attempt, attempts, object_at, read_history
from mpillm.runs.history_writer import HISTORY
from mpillm.runs.lock import LOCK, Holder, live_holder, modified
from mpillm.runs.metrics import METRICS, RECIPE, read_metrics
from mpillm.runs.submit import JOB, read_job
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

SUBMITTED, UNKNOWN, FINISHED = "submitted", "unknown", "finished"
# Steps that stand for how it goes now.
RECENT = 50
Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Kept:
    """A checkpoint that lies in the run's folder."""

    folder: Path
    step: int
    bytes: int
    written: float
    """Unix seconds."""


@dataclass(frozen=True)
class RunState:
    run: Path
    name: str
    now: float
    """When it was read, in unix seconds."""
    state: str
    """running, finished, stopped, failed, killed (without a word), submitted, or unknown: no history tells."""
    reason: str
    holder: str
    """Who holds the run's lock and gives signs of life; empty where nobody does."""
    steps: Columns
    """The metrics of each step, a column a key, NaN where a step has none."""
    evaluations: Columns
    attempts: tuple[Attempt, ...]
    checkpoints: tuple[Kept, ...]
    """The oldest first."""
    recipe: Mapping[str, Any]
    job: Mapping[str, Any]
    """As `mpillm submit` wrote it; empty where nobody submitted the run."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.steps["step"][-1]) if self.steps.get("step") else 0

    @property
    def goal(self) -> int:
        """Steps that are wanted; 0 where nothing tells."""
        wanted = object_at(self.recipe, "train").get("steps") or (
            self.attempts[-1].facts.get("steps") if self.attempts else 0
        )
        return wanted if isinstance(wanted, int) else 0

    @property
    def steps_left(self) -> int:
        return max(0, self.goal - self.step)

    def recent(self, key: str) -> list[float]:
        """The finite values of the last steps, of the newest attempt alone if it has any."""
        first = self.attempts[-1].first_step if self.attempts else 0
        steps, values = self.steps.get("step", ()), self.steps.get(key, ())
        tail = list(zip(steps, values, strict=False))[-RECENT:]
        newest = [value for step, value in tail if step > first and math.isfinite(value)]
        return newest or [value for _, value in tail if math.isfinite(value)]


def read_run(run: Path, now: float | None = None) -> RunState:
    """Read a run's folder, be it at work or not. Raises UsageError where there is no run."""
    check_run(run)
    now = time.time() if now is None else now
    metrics = list(read_metrics(run / METRICS))
    steps = columns(line for line in metrics if "validation_loss" not in line)
    evaluations = columns(line for line in metrics if "validation_loss" in line)
    recipe, job = read_recipe(run / RECIPE), read_job(run)
    reached = int(steps["step"][-1]) if steps else 0
    holder, tried = _attempts(run, reached, now)
    if tried and tried[-1].how == KILLED:
        # Between a look at the lock and one at the history a job may have begun or ended.
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
        tuple(kept(run)),
        recipe,
        job,
    )


def check_run(run: Path) -> None:
    """Raise UsageError, with the way out, where `run` is no run's folder."""
    if not run.exists():
        raise UsageError(
            f"there is no run {run}; name the folder that a recipe's train.run names, such as runs/quickstart"
        )
    if not run.is_dir():
        raise UsageError(
            f"{run} is a file; name the run's folder (a recipe's train.run, such as runs/quickstart)"
        )
    if (run / INDEX).exists() and run.parent.name == CHECKPOINTS:
        raise UsageError(
            f"{run} is one checkpoint; name the run that it belongs to: {run.parent.parent}"
        )
    if not any((run / name).exists() for name in (METRICS, HISTORY, CHECKPOINTS, RECIPE, JOB)):
        raise UsageError(
            f"{run} is no run: it holds none of {METRICS}, {HISTORY}, {CHECKPOINTS}/, {RECIPE} and {JOB}; "
            "name the folder that a recipe's train.run names"
        )


def columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, "array[float]"]:
    """Objects turned into a column a key; what has no number is NaN. Lines without a step are left out."""
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
    """The sections of a resolved recipe; empty where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def kept(run: Path) -> list[Kept]:
    """The checkpoints of a run, the oldest first. One that is removed meanwhile is left out."""
    found = []
    for step, folder in checkpoint_folders(run / CHECKPOINTS).items():
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(
                Kept(
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
    """Who holds the run, and the attempts at it."""
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
    """(state, reason)."""
    if tried:
        return tried[-1].how, tried[-1].reason
    if alive:
        return RUNNING, ""
    if reached:
        # An mpillm before the history was kept.
        return (
            FINISHED if reached >= object_at(recipe, "train").get("steps", math.inf) else UNKNOWN
        ), ""
    return (SUBMITTED if job else UNKNOWN), ""
