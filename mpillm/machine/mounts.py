"""The file system of a path, as Linux's mount table names it, and whether file locks work there."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its mount point, its kind (`lustre`, `nfs4` …) and its options."""

    place: str
    kind: str
    options: frozenset[str]


def mounts_of(text: str) -> list[Mount]:
    """Parse the lines of /proc/self/mountinfo, as proc(5) defines them.

    The fifth field is the mount point. After a lone hyphen follow the kind, the source and the
    options of the file system itself.
    """
    found = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        before, after = head.split(" "), tail.split(" ")
        if len(before) > 5 and len(after) > 2:
            # The kernel writes spaces and line ends of a path as octal numbers.
            place = _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), before[4])
            found.append(
                Mount(place, after[0], frozenset([*before[5].split(","), *after[2].split(",")]))
            )
    return found


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """Find the mount of the absolute `path`: the longest mount point above it.

    Of two mounts on the same place the later one hides the earlier one.
    """
    best: Mount | None = None
    for mount in mounts:
        above = path == mount.place or path.startswith(mount.place.rstrip("/") + "/")
        if above and (best is None or len(mount.place) >= len(best.place)):
            best = mount
    return best


def read_mounts(table: Path = MOUNTS) -> list[Mount]:
    """Read the mounts of this process; none where Linux offers no table."""
    try:
        return mounts_of(table.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return []


def locks_fail(mount: Mount) -> bool:
    """Return whether file locks are known to fail or to hang on `mount`.

    Locks of GPFS, BeeGFS, NFS 4 and local disks work.
    """
    if mount.kind == "lustre":
        # Lustre refuses locks unless it is mounted with one of these.
        return not mount.options & {"flock", "localflock"}
    # NFS 3 needs a lock daemon, which compute nodes often lack; Cray's DVS forwards no locks.
    return mount.kind in ("nfs", "dvs")


def hdf5_file_locking(setting: bool | None, paths: Iterable[str], mounts: Sequence[Mount]) -> str:
    """Choose the value of HDF5_USE_FILE_LOCKING for files below the absolute `paths`.

    The site's `setting` decides where it is given. Else the value is FALSE where a path's file
    system has no locks, and empty elsewhere, which leaves the choice to HDF5.
    """
    if setting is not None:
        return "TRUE" if setting else "FALSE"
    under = [mount_of(path, mounts) for path in paths]
    return "FALSE" if any(mount is not None and locks_fail(mount) for mount in under) else ""
