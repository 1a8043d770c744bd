"""Whether HDF5 should lock its files, by the file systems that they lie on."""

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
            found.append(Mount(place, after[0], frozenset([*before[5].split(","), *after[2].split(",")])))
    return found


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that the whole path lies on: the longest place above it, and of equals the last mounted."""
    best: Mount | None = None
    for mount in mounts:
        above = path == mount.place or path.startswith(mount.place.rstrip("/") + "/")
        if above and (best is None or len(mount.place) >= len(best.place)):
            best = mount
    return best


def locks_fail(mount: Mount) -> bool:
    """Whether file locks are known to fail or to hang there.

    Lustre has them only where it is mounted with flock or localflock; NFS before version 4 needs a lock daemon, which
    compute nodes often lack; Cray's DVS passes none on. Locks of GPFS, BeeGFS, NFS 4 and local disks work.
    """
    if mount.kind == "lustre":
        return not mount.options & {"flock", "localflock"}
    return mount.kind in ("nfs", "dvs")


def hdf5_file_locking(wish: bool | None, paths: Iterable[str], mountinfo: str) -> str:
    """What HDF5_USE_FILE_LOCKING should be: the site's wish, else FALSE where a path's file system has no locks, else
    empty, which leaves it to HDF5. `paths` are whole.
    """
    if wish is not None:
        return "TRUE" if wish else "FALSE"
    mounts = mounts_of(mountinfo)
    under = [mount_of(path, mounts) for path in paths]
    return "FALSE" if any(mount is not None and locks_fail(mount) for mount in under) else ""
