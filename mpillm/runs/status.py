"""`mpillm status`: the state of a run, its speed, and the next command."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mpillm.errors import MpillmError
from mpillm.launch.schedulers.scheduler_catalog import is_over
from mpillm.runs.history import KILLED, RUNNING, Attempt, finite_seconds, object_at
from mpillm.runs.next_step import next_step
from mpillm.runs.run_files import moved_from
from mpillm.runs.state import (
    FINISHED,
    SUBMITTED,
    SUSPENDED,
    UNKNOWN,
    KeptCheckpoint,
    RunState,
    read_run,
)
from mpillm.system.console import Console, binary_bytes, clock
from mpillm.system.json_text import to_json
from mpillm.weights.places import step_of

Ask = Callable[[str, str], str]
"""(scheduler, job id) → the scheduler's word for the state of the job; empty without one."""
# Further names are counted and not listed.
MOST_HOSTS = 4


def print_status(
    run: Path, console: Console, as_json: bool = False, ask: Ask | None = None
) -> None:
    """Print the state of a run, as a table or as one JSON object.

    Raises UsageError for another folder than a run's.
    """
    found = run_figures(read_run(run), ask)
    if as_json:
        console.write(to_json(found) + "\n")
    else:
        console.facts(str(run), facts(found))
        # Outside of the table, which would break a command over lines: it can be pasted.
        console.say(f"next: {found['next']}")


def run_figures(run_state: RunState, ask: Ask | None = None) -> dict[str, Any]:
    """Return the state of a run as plain values: seconds, bytes, unix seconds; None if unknown."""
    last = run_state.attempts[-1] if run_state.attempts else None
    job = dict(run_state.job) or (last.job if last else {})
    job_state = _asked(job, ask)
    waits = bool(job_state) and not is_over(str(job["scheduler"]), job_state)
    step_seconds = _median(run_state.recent("step_seconds"))
    deadline = finite_seconds(last.facts.get("deadline")) if last and last.how == RUNNING else None
    newest = run_state.checkpoints[-1] if run_state.checkpoints else None
    text, commands = next_step(run_state, newest, waits)
    return {
        "run": str(run_state.run),
        "state": run_state.state,
        "reason": run_state.reason,
        "holder": run_state.holder,
        "job": {**{key: job.get(key) for key in ("scheduler", "id", "output")}, "state": job_state}
        if job
        else None,
        "step": run_state.step,
        "steps": run_state.goal or None,
        "loss": _last(run_state.steps.get("loss", ())),
        "recent_loss": _mean(run_state.recent("loss")),
        "validation_loss": _last(run_state.evaluations.get("validation_loss", ())),
        "validation_step": _count(run_state.evaluations.get("step", ())),
        "tokens": _count(run_state.steps.get("tokens", ())),
        "tokens_per_second": _median(run_state.recent("tokens_per_second")),
        "step_seconds": step_seconds,
        "memory": _memory(run_state, last),
        "seconds_left": finite_seconds(step_seconds * run_state.steps_left)
        if step_seconds is not None and run_state.goal
        else None,
        "seconds_to_deadline": None if deadline is None else deadline - run_state.now,
        "checkpoint": _checkpoint(newest, run_state.now),
        "best_checkpoint": best_figures(run_state),
        "lost_checkpoint": run_state.lost_checkpoint or None,
        "attempts": [_attempt(attempt) for attempt in run_state.attempts],
        "moved_from": moved_from(
            run_state.run, run_state.recipe, last.facts.get("folder") if last else None
        )
        or None,
        "damage": dict(run_state.damage),
        "next": text,
        "commands": commands,
    }


def facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Write the rows of the table; leave out unknown values."""
    rows = {
        "state": state_text(found),
        "job": _job_text(found["job"]),
        "step": f"{found['step']:,}" + (f" of {found['steps']:,}" if found["steps"] else ""),
        "loss": _loss_text(found),
        "validation loss": _validation_text(found),
        "speed": _speed_text(found),
        "memory a rank": _memory_text(found["memory"]),
        "time left": _left_text(found),
        "checkpoint": _checkpoint_text(found["checkpoint"], found["lost_checkpoint"]),
        "best checkpoint": _best_text(found["best_checkpoint"]),
        "attempts": _attempts_text(found["attempts"]),
        "moved": f"its recipe names {found['moved_from']}: this is a copy, or was moved"
        if found["moved_from"]
        else "",
        "damage": "; ".join(found["damage"].values()),
    }
    return {name: text for name, text in rows.items() if text}


def _asked(job: Mapping[str, Any], ask: Ask | None) -> str:
    if ask is None or not job.get("scheduler") or not job.get("id"):
        return ""
    try:
        return ask(str(job["scheduler"]), str(job["id"]))
    except MpillmError:
        # A batch system that does not answer must not hide the run's own files.
        return ""


def host_names(names: Sequence[str]) -> str:
    """Write `n1, n2`, or the first few of many and the number of the others."""
    more = len(names) - MOST_HOSTS
    return ", ".join(names[:MOST_HOSTS]) + (f" and {more:,} more" if more > 0 else "")


def moment(seconds: float) -> str:
    """Write unix seconds as `2026-11-26 14:00:00` in local time."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        # A file may have been given any date.
        return f"{seconds:.4g} s after 1970"


def state_text(found: Mapping[str, Any]) -> str:
    """Write the state in a phrase: where, since when, why. `found` comes from `run_figures`."""
    state, reason = str(found["state"]), f": {found['reason']}" if found["reason"] else ""
    last = found["attempts"][-1] if found["attempts"] else None
    held = (
        f"; held by {found['holder']}"
        if found["holder"] and state not in (RUNNING, SUSPENDED, FINISHED)
        else ""
    )
    if state == SUBMITTED:
        return f"submitted, not started yet{held}"
    if state == UNKNOWN:
        return f"unknown: it has no history (never trained, or by an early mpillm){held}"
    if last is None:
        return f"{state} {found['holder']}".rstrip() + reason
    if state in (RUNNING, SUSPENDED):
        where = f" on {host_names(last['hosts'])}" if last["hosts"] else ""
        since = f"since {moment(last['began'])} ({clock(last['seconds'])})"
        return f"{state}{where} {since}{reason}"
    if state == KILLED:
        return f"killed, no end on record; last trace {moment(last['ended'])}{held}"
    return f"{state} {moment(last['ended'])}{reason}{held}"


def _job_text(job: Mapping[str, Any] | None) -> str:
    if not job:
        return ""
    state = f": {job['state']}" if job["state"] else ""
    return f"{job['scheduler']} {job['id']}{state}" + (
        f"; its output: {job['output']}" if job["output"] else ""
    )


def _loss_text(found: Mapping[str, Any]) -> str:
    if found["loss"] is None:
        return ""
    mean = (
        f" (mean of the last steps {found['recent_loss']:.4f})"
        if found["recent_loss"] is not None
        else ""
    )
    return f"{found['loss']:.4f}{mean}"


def _validation_text(found: Mapping[str, Any]) -> str:
    loss = found["validation_loss"]
    return "" if loss is None else f"{loss:.4f} at step {found['validation_step']:,}"


def _speed_text(found: Mapping[str, Any]) -> str:
    rate, seconds = found["tokens_per_second"], found["step_seconds"]
    return (
        "" if rate is None or seconds is None else f"{rate:,.0f} tokens/s, {seconds:.3g} s a step"
    )


def _left_text(found: Mapping[str, Any]) -> str:
    left, deadline = found["seconds_left"], found["seconds_to_deadline"]
    if left is None or found["state"] == FINISHED:
        return ""
    steps = f"{clock(left)} for {found['steps'] - found['step']:,} steps"
    if deadline is None:
        return steps
    if deadline <= 0:
        return f"{steps}; the job's time is over"
    short = ", too early: it will save and stop before" if deadline < left else ""
    return f"{steps}; the job ends in {clock(deadline)}{short}"


def _checkpoint_text(checkpoint: Mapping[str, Any] | None, lost: str | None) -> str:
    gone = f"; the last one on record, {lost}, is gone" if lost else ""
    if checkpoint is None:
        return f"none{gone or ' yet'}"
    return f"{checkpoint['path']}, {clock(checkpoint['age_seconds'])} ago{gone}"


def best_figures(run_state: RunState) -> dict[str, Any] | None:
    """Return the best checkpoint with its number; None without one."""
    step = step_of(run_state.best) if run_state.best else None
    if step is None:
        return None
    train = object_at(run_state.recipe, "train")
    metric = str(train.get("keep_best") or "validation_loss")
    columns = (run_state.evaluations.get(key, ()) for key in ("step", metric))
    values = [value for at, value in zip(*columns, strict=False) if at == step]
    return {
        "path": str(run_state.best),
        "step": step,
        "metric": metric,
        "value": values[-1] if values and math.isfinite(values[-1]) else None,
    }


def _best_text(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return ""
    value = "" if best["value"] is None else f" {best['value']:.4f}"
    return f"{best['path']}, {best['metric'].replace('_', ' ')}{value}"


def _attempts_text(attempts: Sequence[Mapping[str, Any]]) -> str:
    if len(attempts) < 2:
        return ""
    ends = [attempt["how"] for attempt in attempts]
    return f"{len(ends)}: " + ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


def _memory(run_state: RunState, last: Attempt | None) -> dict[str, int | None]:
    """Return the peak of the last attempt's largest rank, in bytes: predicted, and measured."""
    steps = run_state.recent("memory_bytes")
    so_far = int(max(steps)) if steps and max(steps) >= 0 else None
    return {
        "predicted_bytes": last.predicted_memory_bytes if last else None,
        "measured_bytes": (last.memory_bytes if last else None) or so_far,
    }


def _memory_text(memory: Mapping[str, int | None]) -> str:
    named = {"measured": memory["measured_bytes"], "predicted": memory["predicted_bytes"]}
    return ", ".join(f"{binary_bytes(n)} {name}" for name, n in named.items() if n)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "began": attempt.began.timestamp(),
        "ended": attempt.ended.timestamp(),
        "seconds": attempt.seconds,
        "first_step": attempt.first_step,
        "last_step": attempt.last_step,
        "how": attempt.how,
        "reason": attempt.reason,
        "ranks": attempt.ranks,
        "hosts": list(attempt.hosts),
        "job": attempt.job or None,
    }


def _checkpoint(newest: KeptCheckpoint | None, now: float) -> dict[str, Any] | None:
    if newest is None:
        return None
    age = max(0.0, now - newest.written)
    return {
        "path": str(newest.folder),
        "step": newest.step,
        "bytes": newest.bytes,
        "age_seconds": age,
    }


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _count(values: Sequence[float]) -> int | None:
    return int(values[-1]) if values and math.isfinite(values[-1]) else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
