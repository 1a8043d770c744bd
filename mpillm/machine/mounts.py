"""Which file system a path lies on, as Linux tells it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    place: str
    kind: str
    options: frozenset[str]


def mounts_of(text: str) -> list[Mount]:
    """The lines of /proc/self/mountinfo (proc(5)): the fifth field is the place; after a lone hyphen stand the kind,
    the source and the file system's own options.
    """
    found = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        before, after = head.split(" "), tail.split(" ")
        if len(before) > 5 and len(after) > 2:
            place = _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), before[4])
            found.append(
                Mount(place, after[0], frozenset([*before[5].split(","), *after[2].split(",")]))
            )
    return found


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that the whole path lies on: the longest place above it, and of equals the last mounted."""
    best: Mount | None = None
    for mount in mounts:
        above = path == mount.place or path.startswith(mount.place.rstrip("/") + "/")
        if above and (best is None or len(mount.place) >= len(best.place)):
            best = mount
    return best


def read_mounts(table: Path = MOUNTS) -> list[Mount]:
    """Those of this process; none where Linux does not tell."""
    try:
        return mounts_of(table.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return []
