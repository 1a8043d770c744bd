"""The state of a run, read once from the files in its folder.

Needs neither torch nor MPI nor the job itself.
"""

import math
import os
import statistics
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.runs.evaluations import RecordedEvaluation, read_evaluations
from mpillm.runs.folder import EVALUATIONS, HISTORY, JOB, LOCK, METRICS, RECIPE
from mpillm.runs.history import (
    KILLED,
    RUNNING,
    Attempt,
    attempts,
    object_at,
    read_history_log,
)
from mpillm.runs.lock import BEAT_SECONDS, HeldLock, find_hold, modified
from mpillm.runs.metrics import read_metrics_log
from mpillm.runs.run_files import read_job_record, read_recipe, recipe_of
from mpillm.system.console import clock
from mpillm.system.json_lines import whole_number
from mpillm.system.messages import command, explain
from mpillm.system.plain_files import is_there
from mpillm.tokens.dataset_folder import is_dataset
from mpillm.weights.places import CHECKPOINTS, INDEX, best_checkpoint, checkpoint_folders

SUBMITTED, UNKNOWN, FINISHED, SUSPENDED = "submitted", "unknown", "finished", "suspended"
# Enough steps for a median that one slow step does not move.
RECENT = 50
# A holder that lives may miss a few beats on a busy file system.
SILENT_SECONDS = 4 * BEAT_SECONDS
# Saves, evaluations and a slow start take longer than steps: this long, and this many steps.
QUIET_SECONDS, QUIET_STEPS = 600.0, 50
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
    """running, suspended, finished, stopped, failed, killed (no end on record), submitted, or
    unknown.
    """
    reason: str
    """Why it ended; while it runs: why it seems not to advance, if so."""
    holder: str
    """The live holder of the run's lock; empty without one."""
    steps: Columns
    """The metrics of each step, a column a key, NaN where a step has none."""
    evaluations: Columns
    scores: tuple[RecordedEvaluation, ...]
    """What `mpillm evaluate` has recorded, the oldest first."""
    attempts: tuple[Attempt, ...]
    checkpoints: tuple[KeptCheckpoint, ...]
    """The oldest first."""
    best: Path | None
    """The best checkpoint, where `train.keep_best` keeps one."""
    recipe: Mapping[str, Any]
    """The resolved recipe; empty where it cannot be read."""
    recipe_path: Path | None
    """The recipe to continue with; None where the run's folder holds none that can be read."""
    job: Mapping[str, Any]
    """The file of `mpillm submit`; empty where the run was not submitted."""
    damage: Mapping[str, str]
    """File → what of it cannot be read."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.steps["step"][-1]) if self.steps.get("step") else 0

    @property
    def goal(self) -> int:
        """Steps that the recipe asks for; 0 where that is unknown."""
        return _goal(self.recipe) or (
            whole_number(self.attempts[-1].facts.get("steps")) or 0 if self.attempts else 0
        )

    @property
    def lost_checkpoint(self) -> str:
        """The checkpoint that was saved last, by the history, where it is gone; else ""."""
        saved = [event for attempt in self.attempts for event in attempt.saved]
        name = saved[-1].facts.get("checkpoint") if saved else None
        if not isinstance(name, str) or any(
            kept.step >= saved[-1].step for kept in self.checkpoints
        ):
            return ""
        return name

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
    """Read a run's folder, while it trains or after. Raises UsageError for another folder.

    What cannot be read of its files is left out, and named in `damage`.
    """
    check_run(run)
    now = time.time() if now is None else now
    log = read_metrics_log(run / METRICS)
    steps = columns(line for line in log.objects if "validation_loss" not in line)
    evaluations = columns(line for line in log.objects if "validation_loss" in line)
    recipe_path, (_, damaged_recipe) = recipe_of(run), read_recipe(run / RECIPE)
    recipe = read_recipe(recipe_path)[0] if recipe_path else {}
    job, damaged_job = read_job_record(run)
    checkpoints, damaged_checkpoints = _checkpoints(run)
    scores, damaged_scores = read_evaluations(run)
    damage = {
        EVALUATIONS: damaged_scores,
        METRICS: log.note(METRICS),
        RECIPE: damaged_recipe,
        JOB: damaged_job,
        CHECKPOINTS: damaged_checkpoints,
    }
    reached = int(steps["step"][-1]) if steps else 0
    hold, tried, damage[HISTORY] = _attempts(run, reached, now)
    if tried and tried[-1].how == KILLED:
        # A job may have begun or ended after the lock was read and before the history was.
        hold, tried, damage[HISTORY] = _attempts(run, reached, now)
    state, reason = _state(tried, hold, reached, recipe, job)
    found = RunState(
        run,
        run.resolve().name,
        now,
        state,
        reason,
        hold.describe() if hold else "",
        steps,
        evaluations,
        tuple(scores),
        tuple(tried),
        tuple(checkpoints),
        best_checkpoint(run / CHECKPOINTS),
        recipe,
        recipe_path,
        job,
        {name: text for name, text in damage.items() if text},
    )
    return replace(found, reason=_quiet(found)) if state == RUNNING and not reason else found


def check_run(run: Path) -> None:
    """Raise UsageError where `run` is not a run's folder, with the folder to name instead."""
    if not is_there(run):
        link = " (it is a link to nothing)" if run.is_symlink() else ""
        raise UsageError(
            f"there is no folder {run}{link}; name the one that a recipe's train.run names, "
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
    if is_dataset(run):
        raise UsageError(
            f"{run} is a dataset's folder and not a run's; "
            "name the folder that a recipe's train.run names"
        )
    marks = (METRICS, HISTORY, CHECKPOINTS, RECIPE, JOB)
    if not any(os.path.lexists(run / name) for name in marks):
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
            column.append(_real(value))
        count += 1
    for column in found.values():
        _fill(column, count)
    return found


def _real(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _fill(column: "array[float]", length: int) -> None:
    if len(column) < length:
        column.extend([math.nan] * (length - len(column)))


def _goal(recipe: Mapping[str, Any]) -> int:
    return whole_number(object_at(recipe, "train").get("steps")) or 0


def _checkpoints(run: Path) -> tuple[list[KeptCheckpoint], str]:
    """List the checkpoints of a run, the oldest first; say which ones lack their index.

    One that is removed meanwhile is left out.
    """
    found, without = [], []
    try:
        folders = checkpoint_folders(run / CHECKPOINTS)
    except OSError as failure:
        return [], f"{CHECKPOINTS} cannot be read: {explain(failure, run / CHECKPOINTS)}"
    for step, folder in folders.items():
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
            if folder.is_dir():
                without.append(folder.name)
    note = f"no index that can be read: {', '.join(without)}" if without else ""
    return found, note + ("; no checkpoint is whole" if without and not found else "")


def _attempts(run: Path, reached: int, now: float) -> tuple[HeldLock | None, list[Attempt], str]:
    """Return the hold on the run, the attempts at it, and what of its history cannot be read."""
    hold = find_hold(run)
    sign = now if hold else max(modified(run / LOCK), modified(run / METRICS))
    events, log = read_history_log(run / HISTORY)
    tried = attempts(events, hold is not None, datetime.fromtimestamp(sign, UTC), reached)
    return hold, tried, log.note(HISTORY)


def _state(
    tried: Sequence[Attempt],
    hold: HeldLock | None,
    reached: int,
    recipe: Mapping[str, Any],
    job: Mapping[str, Any],
) -> tuple[str, str]:
    """Decide (state, reason)."""
    if hold and (not tried or tried[-1].how == RUNNING):
        return _held(hold)
    if tried:
        return tried[-1].how, tried[-1].reason
    if reached:
        # An early mpillm wrote metrics and no history.
        goal = _goal(recipe)
        return (FINISHED if goal and reached >= goal else UNKNOWN), ""
    return (SUBMITTED if job else UNKNOWN), ""


def _held(hold: HeldLock) -> tuple[str, str]:
    if hold.holder is None:
        return RUNNING, "perhaps: its lock cannot be read, and counts until it expires"
    if hold.suspended:
        proceed = command(["kill", "-CONT", str(hold.holder.pid)])
        return SUSPENDED, f"a signal stopped its process; {proceed} lets it continue"
    if hold.silent_seconds > SILENT_SECONDS:
        return RUNNING, f"silent: its lock has had no update for {clock(hold.silent_seconds)}"
    return RUNNING, ""


def _quiet(run_state: RunState) -> str:
    """Say that no step was recorded for long; "" where that is usual.

    The lock shows the process of rank 0 alone: when another rank is stopped, all wait for it.
    """
    began = run_state.attempts[-1].began.timestamp() if run_state.attempts else run_state.now
    quiet = run_state.now - max(modified(run_state.run / METRICS), began)
    usual = run_state.recent("step_seconds")
    steps = QUIET_STEPS * (statistics.median(usual) if usual else 0.0)
    if quiet <= max(QUIET_SECONDS, steps):
        return ""
    return f"silent: no step was recorded for {clock(quiet)}; a rank may be stopped or lost"
