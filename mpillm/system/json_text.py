"""JSON that every parser takes: without NaN, in UTF-8."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpillm.system.plain_files import LARGEST_FILE, read_plain

# Halves of characters, as Python keeps bytes of names that are no UTF-8. Control characters that
# JSON allows as they are, and marks that reorder a line: no file rules a terminal.
_ESCAPED = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def to_json(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Write `value` as JSON. NaN and the infinities become null, for JSON has no such number."""
    text = json.dumps(
        _finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default
    )
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def to_json_lines(rows: Iterable[Any], default: Any = None) -> str:
    """Write values as JSON, a line each."""
    return "".join(to_json(row, default=default) + "\n" for row in rows)


def from_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for whatever cannot be read, deep nesting included."""
    try:
        return json.loads(text)
    except RecursionError as failure:
        raise ValueError("it is nested too deeply") from failure


def read_json(path: Path) -> Any:
    """Parse a plain file of UTF-8. Raises OSError, and ValueError for whatever cannot be read."""
    return from_json(read_plain(path, most=LARGEST_FILE).decode("utf-8-sig"))


def read_object(path: Path) -> dict[str, Any]:
    """Parse a plain file that holds an object, as `read_json` does."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
