"""JSON lines, an object a line, read as far as they can be.

A log is an aid. A torn line, a byte that is no UTF-8, or the NUL bytes that a crash leaves cost no
more than their line, and such lines are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpillm.system.console import counted
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import LARGEST_TEXT, open_plain


@dataclass(frozen=True)
class JsonLines:
    """What was read of a file of JSON lines."""

    objects: tuple[dict[str, Any], ...] = ()
    faults: int = 0
    """The lines that could not be read, or not whole."""
    failure: str = ""
    """Why the file was not read to its end; "" where it was, or where there is no file."""

    def note(self, name: str) -> str:
        """Write what could not be read of the file `name`; "" where all could."""
        lines = f"{counted(self.faults, 'line')} of {name} cannot be read" if self.faults else ""
        failure = f"{name} cannot be read: {self.failure}" if self.failure else ""
        return "; ".join(filter(None, (lines, failure)))


def read_json_lines(path: Path) -> JsonLines:
    """Read the objects of a file; none without a file. Nothing in the file raises."""
    objects: list[dict[str, Any]] = []
    faults, failure = 0, ""
    try:
        with open_plain(path) as file:
            for line in _lines(file):
                value, whole = _object(line)
                faults += not whole
                if value is not None:
                    objects.append(value)
    except FileNotFoundError:
        failure = f"{path} is a link to nothing; remove it" if path.is_symlink() else ""
    except OSError as caught:
        failure = explain(caught, path)
    return JsonLines(tuple(objects), faults, failure)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield each line; None for one that is longer than any line of a log."""
    while piece := file.readline(LARGEST_TEXT):
        if piece.endswith(b"\n") or len(piece) < LARGEST_TEXT:
            yield piece
            continue
        while piece and not piece.endswith(b"\n"):
            piece = file.readline(LARGEST_TEXT)
        yield None


def _object(line: bytes | None) -> tuple[dict[str, Any] | None, bool]:
    """Return the object of a line, None without one, and whether the line was read whole."""
    if line is None:
        return None, False
    # A crash may leave blocks of NUL bytes where the file grew and was not written.
    whole, data = b"\0" not in line, line.strip(b"\0 \t\r\n")
    if not data:
        return None, whole
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text, whole = data.decode(errors="replace"), False
    try:
        value = from_json(text.removeprefix("\ufeff"))
    except ValueError:
        return None, False
    return (value, whole) if isinstance(value, dict) else (None, False)


def whole_number(value: Any) -> int | None:
    """Return a count from 0, also one that was written as 5.0 or "5"; None for anything else."""
    found = real_number(value)
    # 2^53: larger ones are not exact in a column of float64.
    return int(found) if found is not None and 0 <= found <= 1 << 53 and found % 1 == 0 else None


def real_number(value: Any) -> float | None:
    """Return a number, also one that was written as text, NaN for null; None for anything else."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        # An integer stays one: a file that is written again keeps its spelling.
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return value if isinstance(value, int) else number
