"""JSON lines that a user gives: each is an object with known fields, or the file is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpillm.errors import DataError
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain, some_of
from mpillm.system.plain_files import LARGEST_FILE, read_text


def read_given(path: Path) -> str:
    """Read a text file that a user named. Raises DataError."""
    try:
        return read_text(path, most=LARGEST_FILE)
    except OSError as failure:
        raise DataError(f"cannot read {explain(failure, path)}") from failure
    except ValueError as failure:
        raise DataError(f"cannot read {path}: {failure}") from failure


def strict_lines(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line that is not empty.

    Raises DataError, with the place, for a line that is no object or lacks one of `fields`, which
    are texts.
    """
    # Not by splitlines: a text may hold other ends of lines, such as U+2028.
    for number, line in enumerate(read_given(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number:,}"
        try:
            value = from_json(line)
        except ValueError as failure:
            raise DataError(f"{place}: it is no JSON: {failure}") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: it is no object; write one with the fields {_named(fields)}")
        for name in fields:
            if not isinstance(value.get(name), str):
                raise DataError(
                    f"{place}: it has no text {name!r}, but {some_of(value)}; a line has the "
                    f"fields {_named(fields)}"
                )
        yield place, value


def _named(fields: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in fields)
