"""Reading a run's history: who trained it when, and how each attempt ended. Needs neither torch nor MPI."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STARTED, SAVED, ENDS = "started", "saved", ("finished", "stopped", "failed")
RUNNING, KILLED = "running", "killed"


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
    """From one start to its end. Times have a zone."""

    number: int
    """From 1."""
    began: datetime
    first_step: int
    """Steps that were done when it began."""
    ended: datetime
    """The last sign of it, where it was killed or is running."""
    last_step: int
    """The last step that is known of it: one that was killed may have done more."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its start told: ranks, hosts, mesh, versions, job …"""
    how: str = KILLED
    """finished, stopped, failed, running, or killed: it ended without a word."""
    reason: str = ""
    saved: tuple[Event, ...] = ()

    @property
    def seconds(self) -> float:
        return max(0.0, (self.ended - self.began).total_seconds())

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Name → its ranks."""
        return {
            str(name): [int(rank) for rank in ranks]
            for name, ranks in object_at(self.facts, "hosts").items()
        }

    @property
    def job(self) -> dict[str, Any]:
        """The batch job: scheduler, id, restart; empty where there was none."""
        job = object_at(self.facts, "job")
        return job if job.get("scheduler") and job.get("id") else {}


def read_history(path: Path) -> list[Event]:
    """The events of a history file, none if there is no such file.

    Lines that tell nothing are left out: one that is being written, one that a crash cut short, one of a later mpillm.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [event for event in map(_event, lines) if event is not None]


def _event(line: str) -> Event | None:
    try:
        facts = json.loads(line)
        time = datetime.fromisoformat(facts["time"])
        return Event(
            str(facts["event"]),
            time if time.tzinfo else time.replace(tzinfo=UTC),
            int(facts["step"]),
            facts,
        )
    except (ValueError, TypeError, KeyError):
        return None


def attempts(
    events: Iterable[Event], alive: bool = False, now: datetime | None = None, reached: int = 0
) -> list[Attempt]:
    """The attempts at a run, in their order.

    `alive`: somebody holds the run, so that a last attempt without an end is running. `now`: the last sign of such an
    attempt. `reached`: the last step in the run's metrics, which only the last attempt can have done.
    """
    found: list[Attempt] = []
    open_ended = False
    for event in events:
        if event.name == STARTED:
            found.append(
                Attempt(len(found) + 1, event.time, event.step, event.time, event.step, event.facts)
            )
            open_ended = True
        elif found and open_ended:
            found[-1] = _went_on(found[-1], event)
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


def _went_on(attempt: Attempt, event: Event) -> Attempt:
    attempt = replace(attempt, ended=event.time, last_step=max(attempt.last_step, event.step))
    if event.name == SAVED:
        return replace(attempt, saved=(*attempt.saved, event))
    if event.name in ENDS:
        return replace(attempt, how=event.name, reason=str(event.facts.get("reason") or ""))
    return attempt


def object_at(facts: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON object at `key`; empty where there is something else, or nothing."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}
