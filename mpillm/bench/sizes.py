"""Sizes as people type them: `1K:256M:x2`, `64,1M,4M`, `0.5M:4M:+512K`; K, M and G are binary."""

import re

from mpillm.errors import UsageError

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MOST_SIZES = 1000
LARGEST_BYTES = 1 << 40
WAY_OUT = "write --sizes as 1K:256M:x2 (first:last:factor), 1M:4M:+1M (first:last:step) or a list such as 64,1M,4M"


def parse_sizes(text: str) -> tuple[int, ...]:
    """The sizes that `text` names, ascending, each once. Raises UsageError for what is no size."""
    sizes: set[int] = set()
    for item in text.split(","):
        sizes.update(_series(item, text))
        if len(sizes) > MOST_SIZES:
            raise UsageError(
                f"--sizes {text} names more than {MOST_SIZES:,} sizes; take a larger step"
            )
    return tuple(sorted(sizes))


def _series(item: str, text: str) -> list[int]:
    parts = item.split(":")
    if len(parts) > 3:
        raise UsageError(
            f"--sizes {text}: {item!r} has {len(parts)} parts, at most three; {WAY_OUT}"
        )
    first, last = _size(parts[0], text), _size(parts[-1 if len(parts) < 3 else 1], text)
    if last < first:
        raise UsageError(
            f"--sizes {text}: {item!r} ends below its start, {last:,} < {first:,}; {WAY_OUT}"
        )
    factor, step = _stride(parts[2] if len(parts) == 3 else "x2", text)
    found: list[int] = []
    size = first
    while size <= last and len(found) <= MOST_SIZES:
        found.append(size)
        size = max(size + 1, int(size * factor) + step)
    return found


def _stride(text: str, whole: str) -> tuple[float, int]:
    """`x2` → (2, 0), `+1M` → (1, 1048576)."""
    kind, rest = text[:1], text[1:]
    if kind == "+":
        return 1.0, _size(rest, whole)
    if kind != "x" or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", rest) or float(rest) <= 1:
        raise UsageError(
            f"--sizes {whole}: {text!r} is neither x and a factor above 1 nor + and a size; {WAY_OUT}"
        )
    return float(rest), 0


def _size(text: str, whole: str) -> int:
    match = re.fullmatch(
        r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]?)(?:i?b)?\s*", text.lower(), re.ASCII
    )
    if match is None:
        raise UsageError(f"--sizes {whole}: {text!r} is no size; {WAY_OUT}")
    size = int(float(match[1]) * UNITS[match[2]])
    if not 1 <= size <= LARGEST_BYTES:
        raise UsageError(
            f"--sizes {whole}: {text!r} is {size:,}, outside 1 to {LARGEST_BYTES:,}; {WAY_OUT}"
        )
    return size
