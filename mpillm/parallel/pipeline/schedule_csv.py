"""Read and write schedules as CSV files: one row a rank, cells such as `0F0`, `1B3`, `0W2`.

This is the format of computation-only files of torch.distributed.pipelining and torchtitan: stage,
kind, microbatch. B is a whole backward, I its half for the stage's input, W its half for the
weights. An empty cell is idle time.
"""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, Kind, PipelineSchedule
from mpillm.parallel.pipeline.check import check
from mpillm.system.plain_files import read_text

# Nine digits at most: a longer number is a mistake, and would cost memory before it is found.
_CELL = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")


def read_schedule(path: Path) -> PipelineSchedule:
    """Read and check the schedule in the file `path`; its cells give stages and microbatches.

    In older files B is the half for the input. It is read as I where the same stage and microbatch
    has a W and no I. Raises LayoutError for a file that cannot be read, a cell that is not an
    action, or a schedule that cannot run.
    """
    rows = [_actions(path, number, cells) for number, cells in enumerate(_lines(path), 1)]
    # Editors leave blank lines at the end. A blank line between rows is a rank without a stage.
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise LayoutError(
            f"{path} holds no actions; write a row a rank, with cells such as 0F0,1F0,1B0,0B0"
        )
    every = [action for row in rows for action in row]
    named = set(every)
    schedule = PipelineSchedule(
        path.name,
        tuple(tuple(_as_half(action, named) for action in row) for row in rows),
        max(action.stage for action in every) + 1,
        max(action.microbatch for action in every) + 1,
    )
    check(schedule)
    return schedule


def write_schedule(schedule: PipelineSchedule) -> str:
    """Return `schedule` as the text of a file that `read_schedule` reads back."""
    return "".join(",".join(map(str, row)) + "\n" for row in schedule.rows)


def _lines(path: Path) -> list[list[str]]:
    try:
        # Spreadsheet programs put a byte order mark first, or write UTF-16.
        return list(csv.reader(io.StringIO(read_text(path), newline="")))
    except (OSError, ValueError, csv.Error) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise LayoutError(
            f"cannot read the schedule {path}: {reason}; name a CSV file, a row a rank"
        ) from failure


def _actions(path: Path, row: int, cells: list[str]) -> list[Action]:
    found = []
    for column, cell in enumerate(cells, 1):
        text = cell.strip()
        match = _CELL.fullmatch(text)
        if match:
            found.append(Action(int(match[1]), cast("Kind", match[2]), int(match[3])))
        elif text:
            raise LayoutError(
                f"{path}, row {row}, column {column}: {text!r} is not an action; "
                "a cell is a stage, then F, B, I or W, then a microbatch, such as 0F3, or empty "
                "(leave out messages, they follow from the rest)"
            )
    return found


def _as_half(action: Action, named: set[Action]) -> Action:
    """Turn the B of older files, which has a W and no I next to it, into I."""
    alone = (
        action.kind == "B"
        and replace(action, kind="W") in named
        and replace(action, kind="I") not in named
    )
    return replace(action, kind="I") if alone else action
