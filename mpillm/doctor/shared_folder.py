"""Whether a folder is the same on all hosts of the job: rank 0 leaves a file there, and the others look for it."""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.doctor.findings import Finding, hosts_text
from mpillm.doctor.folders import AREA
from mpillm.doctor.timed_barrier import meet

if TYPE_CHECKING:
    from mpi4py import MPI

# A file server's clients may learn of a new file a little late.
LOOK_SECONDS = 3.0


def seen_by(
    comm: "MPI.Intracomm", paths: Sequence[Path], leader: bool, host: str
) -> dict[str, dict[str, bool]]:
    """Path → host → whether it sees there what rank 0 wrote; {} for a path that rank 0 cannot write. Every rank calls
    it; one rank a host, the `leader`, looks.
    """
    name = comm.bcast(f".mpillm-doctor-{secrets.token_hex(8)}" if comm.rank == 0 else None)
    left = [_leave(path / name, name) for path in paths] if comm.rank == 0 else None
    meet(comm)
    written = comm.bcast(left)
    looks = [
        leader and there and _look(path / name, name)
        for path, there in zip(paths, written, strict=True)
    ]
    meet(comm)
    if comm.rank == 0:
        for path in paths:
            with suppress(OSError):
                (path / name).unlink()
    told = comm.allgather((host, looks) if leader else None)
    return {
        str(path): {one[0]: one[1][number] for one in told if one is not None}
        if written[number]
        else {}
        for number, path in enumerate(paths)
    }


def _leave(path: Path, text: str) -> bool:
    try:
        path.write_text(text, encoding="ascii")
    except OSError:
        return False
    return True


def _look(path: Path, text: str) -> bool:
    """Try for a while: a file that is there is found at once on most systems."""
    until = time.monotonic() + LOOK_SECONDS
    while True:
        with suppress(OSError):
            # Some clients look anew only when the folder itself is opened.
            os.close(os.open(path.parent, os.O_RDONLY))
            if path.read_text(encoding="ascii") == text:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def judge_sharing(path: str, seen: Mapping[str, bool], asked: bool) -> Finding | None:
    """`asked`: the user named the folder, so that runs and data are to lie there. None where nothing can be said."""
    if not seen:
        return None
    name, blind = f"{path}: shared", [host for host, sees in seen.items() if not sees]
    if not blind:
        return Finding(AREA, name, "ok", f"the same folder on all {len(seen)} hosts")
    found = f"not the same folder on all hosts: {hosts_text(blind)} do{'es' if len(blind) == 1 else ''} not see what "
    found += f"{next(iter(seen))} writes there"
    remedy = "keep runs and data on a file system that all hosts mount (scratch, work, NFS), at the same path"
    return Finding(AREA, name, "error" if asked else "warning", found, remedy)
