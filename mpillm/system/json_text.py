"""Text files by their byte-order mark, and JSON that every parser takes: without NaN, in UTF-8."""

import json
import math
import re
from pathlib import Path
from typing import Any

from mpillm.system.plain_files import LARGEST_FILE, read_plain

# Bytes of file names that are no UTF-8, as Python keeps them, and other halves of characters.
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Write `value` as JSON. NaN and the infinities become null, for JSON has no such number."""
    text = json.dumps(
        _finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default
    )
    return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text)


def from_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for whatever cannot be read, deep nesting included."""
    try:
        return json.loads(text)
    except RecursionError as failure:
        raise ValueError("it is nested too deeply") from failure


def read_json(path: Path) -> Any:
    """Parse a plain file of UTF-8. Raises OSError, and ValueError for whatever cannot be read."""
    return from_json(read_plain(path, most=LARGEST_FILE).decode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
