"""The history of a run: its starts, saves and ends, an object a line; and its outcome in one word.

    {"event": "started", "time": "2026-11-26T14:00:00+0100", "step": 0, "ranks": 4, …}

docs/formats.md lists every key. Batch scripts read the outcome from a file of its own.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mpillm.errors import UsageError
from mpillm.runs.folder import HISTORY, OUTCOME
from mpillm.system.atomic import flush, write_text
from mpillm.system.json_lines import JsonLines, read_json_lines, real_number, whole_number
from mpillm.system.json_text import to_json

STARTED, SAVED, ENDS = "started", "saved", ("finished", "stopped", "failed")
RUNNING, KILLED = "running", "killed"
Outcome = Literal["running", "finished", "stopped", "failed"]
# Times outside of these years are damage; they would overflow in other time zones.
FIRST_YEAR, LAST_YEAR = 1971, 9000
# More than a thousand years: damage.
LONGEST_SECONDS = 1e11


@dataclass(frozen=True)
class Event:
    """A line of history.jsonl."""

    name: str
    time: datetime
    step: int
    """Steps done so far."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """An attempt at the run, from one start to its end. Times have a zone."""

    number: int
    """From 1."""
    began: datetime
    first_step: int
    """Steps that were done when it began."""
    ended: datetime
    """The last trace of it, where it was killed or is running."""
    last_step: int
    """The last step on record: a killed attempt may have done more."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The facts of its start: ranks, hosts, mesh, versions, job …"""
    how: str = KILLED
    """finished, stopped, failed, running, or killed: it recorded no end."""
    reason: str = ""
    memory_bytes: int | None = None
    """The peak of its largest rank, where it ended in order."""
    saved: tuple[Event, ...] = ()

    @property
    def seconds(self) -> float:
        return max(0.0, (self.ended - self.began).total_seconds())

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Name → its ranks."""
        return {
            name: [rank for rank in map(whole_number, ranks) if rank is not None]
            for name, ranks in object_at(self.facts, "hosts").items()
            if isinstance(ranks, list)
        }

    @property
    def ranks(self) -> int | None:
        return whole_number(self.facts.get("ranks")) or None

    @property
    def predicted_memory_bytes(self) -> int | None:
        """What the plan predicted for the peak of the largest rank."""
        return whole_number(self.facts.get("predicted_memory_bytes")) or None

    @property
    def job(self) -> dict[str, Any]:
        """The batch job: scheduler, id, restart; empty without one."""
        job = object_at(self.facts, "job")
        return job if job.get("scheduler") and job.get("id") else {}


class HistoryWriter:
    """Write the history of the run in `folder` on rank 0; elsewhere (`writes` false) do nothing."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder, self._writes = folder, writes

    def started(self, step: int, facts: Mapping[str, Any]) -> None:
        """Record a start. Raises UsageError where the run's folder cannot hold its history."""
        try:
            self._add(STARTED, step, facts)
            self._write_outcome("running")
        except OSError as failure:
            path = failure.filename or self._folder / HISTORY
            raise UsageError(
                f"cannot write {path}: {failure.strerror or failure}; move it away, free some "
                "space there, or name another train.run"
            ) from failure

    def saved(self, step: int, checkpoint: Path, seconds: float, nbytes: int) -> None:
        name = str(checkpoint.relative_to(self._folder))
        self._add(SAVED, step, {"checkpoint": name, "seconds": seconds, "bytes": nbytes})

    def ended(self, outcome: Outcome, step: int, reason: str = "", memory_bytes: int = 0) -> None:
        """Record that the run finished, failed, or stopped: saved, and to be resumed.

        `memory_bytes`: the peak of its largest rank; 0: not measured.
        """
        known = {"reason": reason, "memory_bytes": memory_bytes}
        try:
            self._add(outcome, step, {key: value for key, value in known.items() if value})
        finally:
            # Batch scripts decide by the outcome, whatever became of the history.
            self._write_outcome(outcome)

    def _write_outcome(self, outcome: Outcome) -> None:
        if self._writes:
            write_text(self._folder / OUTCOME, f"{outcome}\n", plain=True)

    def _add(self, event: str, step: int, facts: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = to_json({"event": event, "time": now, "step": step, **facts})
        with (self._folder / HISTORY).open("a+b") as file:
            # A killed job may have left half a line: it must not swallow this one.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = "\n" * (file.read() != b"\n") + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # Without it a power cut may lose the name of a file whose bytes are safe.
        flush(self._folder)


def read_history(path: Path) -> list[Event]:
    """Read the events of a history file, as far as they can be read; none without a file.

    Skips lines that cannot be read: half-written ones, and those of a later mpillm.
    """
    return read_history_log(path)[0]


def read_history_log(path: Path) -> tuple[list[Event], JsonLines]:
    """Read the events of a history file; return with them the count of lines that are damaged."""
    log = read_json_lines(path)
    found = [_event(facts) for facts in log.objects]
    events = [event for event in found if event is not None]
    return events, replace(log, faults=log.faults + len(found) - len(events))


def _event(facts: dict[str, Any]) -> Event | None:
    name, step = facts.get("event"), whole_number(facts.get("step"))
    try:
        moment = datetime.fromisoformat(facts["time"])
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(name, str) or step is None or not FIRST_YEAR <= moment.year <= LAST_YEAR:
        return None
    return Event(name, moment if moment.tzinfo else moment.replace(tzinfo=UTC), step, facts)


def last_save_seconds(folder: Path) -> float | None:
    """Return the duration of the run's newest save; None before the first."""
    found = (
        event.facts.get("seconds")
        for event in read_history(folder / HISTORY)
        if event.name == SAVED
    )
    seconds = [value for value in map(finite_seconds, found) if value is not None]
    return seconds[-1] if seconds else None


def finite_seconds(value: Any) -> float | None:
    """Return a duration of a log as a finite number; None for anything else."""
    seconds = real_number(value)
    # An integer may be too large for a float's arithmetic.
    return float(seconds) if seconds is not None and 0 <= seconds < LONGEST_SECONDS else None


def attempts(
    events: Iterable[Event], alive: bool = False, now: datetime | None = None, reached: int = 0
) -> list[Attempt]:
    """Group the events of a run into its attempts, in their order.

    `alive`: a job holds the run, so that a last attempt without an end is running. `now`: the
    time of the last trace of such an attempt. `reached`: the last step in the run's metrics,
    which only the last attempt can have done.
    """
    found: list[Attempt] = []
    open_ended = False
    for event in events:
        if event.name == STARTED:
            number = len(found) + 1
            found.append(
                Attempt(number, event.time, event.step, event.time, event.step, event.facts)
            )
            open_ended = True
        elif found and open_ended:
            found[-1] = _extended(found[-1], event)
            open_ended = event.name not in ENDS
    if found and open_ended:
        last = found[-1]
        found[-1] = replace(
            last,
            how=RUNNING if alive else KILLED,
            ended=max(now, last.ended) if now else last.ended,
            last_step=max(last.last_step, reached),
        )
    return found


def _extended(attempt: Attempt, event: Event) -> Attempt:
    attempt = replace(attempt, ended=event.time, last_step=max(attempt.last_step, event.step))
    if event.name == SAVED:
        return replace(attempt, saved=(*attempt.saved, event))
    if event.name in ENDS:
        reason = str(event.facts.get("reason") or "")
        memory = whole_number(event.facts.get("memory_bytes")) or None
        return replace(attempt, how=event.name, reason=reason, memory_bytes=memory)
    return attempt


def object_at(facts: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the JSON object at `key`; empty where there is another value, or none."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}
