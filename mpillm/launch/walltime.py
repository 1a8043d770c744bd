"""Wall time, as users write it and as most batch systems read it."""

import re

from mpillm.errors import UsageError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
LONGEST_DAYS = 365
_CLOCK = re.compile(r"(?:(\d{1,3})-)?(\d{1,4}):(\d{2}):(\d{2})", re.ASCII)
_WORDS = re.compile(r"(?:(\d{1,8})d)?(?:(\d{1,8})h)?(?:(\d{1,8})m)?(?:(\d{1,8})s)?", re.ASCII)


def seconds_of(text: str) -> int:
    """Read `1:30:00`, `2-00:00:00` (two days), `90m`, `2h`, `1h30m` or `45s` as seconds.

    A bare number is refused, for Slurm reads it as minutes and PBS as seconds. So is `1:30`, an
    hour and a half to LSF and a minute and a half to Slurm. Raises UsageError.
    """
    seconds = _seconds(text.strip())
    if seconds is None:
        raise UsageError(
            "a time is H:MM:SS, D-HH:MM:SS or a number with its unit, such as "
            f"1:30:00, 2-00:00:00, 90m, 2h or 1h30m, and not {text!r}"
        )
    if not 0 < seconds <= LONGEST_DAYS * UNITS["d"]:
        raise UsageError(
            f"a time is more than nothing and at most {LONGEST_DAYS} days, and not {text!r}"
        )
    return seconds


def _seconds(text: str) -> int | None:
    if found := _CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        if minutes > 59 or seconds > 59 or (found[1] is not None and hours > 23):
            return None
        return days * UNITS["d"] + hours * UNITS["h"] + minutes * UNITS["m"] + seconds
    if text and (found := _WORDS.fullmatch(text)):
        return sum(
            int(count or 0) * unit
            for count, unit in zip(found.groups(), UNITS.values(), strict=True)
        )
    return None


def clock_time(seconds: int) -> str:
    """Write 5,400 as `01:30:00`; hours may pass 24."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
