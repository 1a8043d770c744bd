"""What happened to a run, an object a line: its starts, saves and ends; and its outcome in one word for batch scripts.

    {"event": "started", "time": "2026-11-26T14:00:00+0100", "step": 0, "ranks": 4, "hosts": {"n1": [0, 1], …}, …}

docs/formats.md tells every key.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mpillm.runs.history import SAVED, STARTED, read_history
from mpillm.system.atomic import flush, write_text

HISTORY, OUTCOME = "history.jsonl", "outcome"
Outcome = Literal["running", "finished", "stopped", "failed"]


class HistoryWriter:
    """The history of the run in `folder`, written by rank 0: elsewhere (`writes` false) it does nothing."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self._folder, self._writes = folder, writes

    def started(self, step: int, facts: Mapping[str, Any]) -> None:
        self._add(STARTED, step, facts)
        self.tell("running")

    def saved(self, step: int, checkpoint: Path, seconds: float, nbytes: int) -> None:
        self._add(
            SAVED,
            step,
            {
                "checkpoint": str(checkpoint.relative_to(self._folder)),
                "seconds": seconds,
                "bytes": nbytes,
            },
        )

    def ended(self, outcome: Outcome, step: int, reason: str = "") -> None:
        """The run is finished, stopped (saved, and to be gone on with) or failed."""
        self._add(outcome, step, {"reason": reason} if reason else {})
        self.tell(outcome)

    def tell(self, outcome: Outcome) -> None:
        if self._writes:
            write_text(self._folder / OUTCOME, f"{outcome}\n")

    def _add(self, event: str, step: int, facts: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        line = json.dumps(
            {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **facts}
        )
        path = self._folder / HISTORY
        with path.open("a+b") as file:
            # A job that was killed may have left half a line.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = "\n" * (file.read() != b"\n") + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        flush(self._folder)


def last_save_seconds(folder: Path) -> float | None:
    """How long the newest save of the run took; None where it has none."""
    told = (
        event.facts.get("seconds")
        for event in read_history(folder / HISTORY)
        if event.name == SAVED
    )
    seconds = [value for value in told if isinstance(value, int | float)]
    return float(seconds[-1]) if seconds else None
