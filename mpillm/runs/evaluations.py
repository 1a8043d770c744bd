"""The evaluations of a run in its folder: what `mpillm evaluate` has found, an object a line.

    {"time": "2026-12-01T14:00:00+0100", "checkpoint": "checkpoints/step-00000400", "step": 400,
     "data": "prepared/reviews", "classes": ["bad", "good"],
     "scores": {"model": {"rows": 1066, "values": {"accuracy": 0.81},
                          "intervals": {"accuracy": [0.79, 0.83]}, "tables": {…}}}}

A record is an aid: damage in the file costs its line alone.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpillm.runs.folder import EVALUATIONS
from mpillm.system.json_lines import read_json_lines, real_number, whole_number
from mpillm.system.json_text import to_json

# Larger tables are no figure to look up, and would be most of a page.
MOST_CLASSES = 40


@dataclass(frozen=True)
class RecordedScore:
    """The figures of one model or baseline."""

    rows: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedEvaluation:
    """A line of the file."""

    time: str
    checkpoint: str
    step: int
    data: str
    classes: tuple[str, ...]
    scores: Mapping[str, RecordedScore]


def is_recorded(run: Path) -> bool:
    """Return whether an evaluation of a run can be recorded: its folder may be another user's."""
    path = run / EVALUATIONS
    return os.access(path if path.exists() else run, os.W_OK)


def record_evaluation(run: Path, facts: Mapping[str, Any]) -> None:
    """Append an evaluation to the run's file. Raises OSError."""
    line = (to_json(facts) + "\n").encode()
    path = run / EVALUATIONS
    if not _ends_a_line(path):
        # The last record is torn, and costs itself alone.
        line = b"\n" + line
    # One write: lines of two jobs do not mix on a local file system.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _ends_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_evaluations(run: Path) -> tuple[list[RecordedEvaluation], str]:
    """Read the evaluations of a run, the oldest first, and what of them cannot be read."""
    lines = read_json_lines(run / EVALUATIONS)
    return [_evaluation(each) for each in lines.objects], lines.note(EVALUATIONS)


def _evaluation(value: Mapping[str, Any]) -> RecordedEvaluation:
    scores, classes = value.get("scores"), value.get("classes")
    return RecordedEvaluation(
        str(value.get("time", "")),
        str(value.get("checkpoint", "")),
        whole_number(value.get("step")) or 0,
        str(value.get("data", "")),
        tuple(map(str, classes)) if isinstance(classes, list) else (),
        {
            str(name): _score(each)
            for name, each in (scores if isinstance(scores, dict) else {}).items()
            if isinstance(each, dict)
        },
    )


def _score(value: Mapping[str, Any]) -> RecordedScore:
    def items(key: str) -> list[tuple[str, Any]]:
        found = value.get(key)
        return list(found.items()) if isinstance(found, dict) else []

    numbers = {name: _number(each) for name, each in items("values")}
    bounds = {name: _numbers(each) for name, each in items("intervals")}
    tables = {
        name: [_numbers(row) for row in each]
        for name, each in items("tables")
        if isinstance(each, list) and len(each) <= MOST_CLASSES
    }
    return RecordedScore(
        whole_number(value.get("rows")) or 0,
        {name: number for name, number in numbers.items() if number is not None},
        {name: (each[0], each[1]) for name, each in bounds.items() if len(each) == 2},
        {name: rows for name, rows in tables.items() if rows and len(set(map(len, rows))) == 1},
    )


def _number(value: Any) -> float | None:
    found = real_number(value)
    return float(found) if found is not None and math.isfinite(found) else None


def _numbers(value: Any) -> list[float]:
    """Return a list of finite numbers; empty for anything else."""
    found = [_number(each) for each in value] if isinstance(value, list) else [None]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else []
