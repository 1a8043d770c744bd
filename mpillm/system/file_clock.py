"""The age of a file by the clock of its file system, for the clocks of two hosts may differ."""

import os
import time
from pathlib import Path

from mpillm.system.atomic import temporary_path

# File systems may round a date, and their servers' clocks differ a little.
AHEAD_SECONDS = 15.0


def file_clock(path: Path) -> float:
    """Return the time now next to `path`, by a probe file; by this host where none can be made."""
    probe = temporary_path(path)
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        now = os.fstat(descriptor).st_mtime
        os.close(descriptor)
        probe.unlink()
    except OSError:
        return time.time()
    return now


def age_seconds(modified: float, changed: float, now: float) -> float:
    """Return how long ago a file was last updated, by the clock of its file system.

    A file may be given any date. A date in the future is not believed: the change of its inode
    counts, which no user can set. Where that is in the future, too, the clock was set back. Then
    the distance counts, and a living holder corrects it with its next touch.
    """
    if modified - now > AHEAD_SECONDS:
        return abs(now - changed)
    return max(0.0, now - modified)
