"""Reward an answer whose last number is that of the data's answer."""

import re
from decimal import Decimal

# 1,234.5 and -3, but no sign in 7-3: a comma counts where three digits follow.
NUMBER = re.compile(r"(?:(?<!\d)[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_number(prompt: str, answer: str, reference: str) -> float:
    """Return 1 where the last numbers of both are equal, 12.50 and 12.5 too; else 0."""
    wanted, found = _last(reference), _last(answer)
    return float(wanted is not None and wanted == found)


def _last(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    # Exact: two floats of many digits may be one.
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-"))
