"""Shared folders: whether all hosts see the same one. Rank 0 writes a file, the others read it."""

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mpillm.doctor.check_base import Check, World
from mpillm.doctor.checks.folders import AREA, folders_to_try
from mpillm.doctor.findings import Finding, hosts_text

# A file server's clients may learn of a new file a little late.
LOOK_SECONDS = 3.0


class SharedFolderCheck(Check):
    name, area = "shared", AREA

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        if len(world.hosts) < 2:
            return []
        # A file server that hangs would take each rank with it that touches its folder.
        ill = {
            row.finding.name
            for row in world.rows
            if (row.finding.area, row.finding.verdict) == (AREA, "error")
        }
        named = world.job.options.paths
        # The folder for temporary files is each host's own, and should be.
        paths = named or folders_to_try(world.job)[:1]
        paths = world.comm.bcast([path for path in paths if str(path) not in ill])
        seen = seen_by(world, paths)
        judged = [judge_sharing(path, hosts, bool(named)) for path, hosts in seen.items()]
        return [finding for finding in judged if finding]


def seen_by(world: World, paths: Sequence[Path]) -> dict[str, dict[str, bool]]:
    """Return path → host → whether the host sees the file of rank 0 there.

    A path that rank 0 cannot write has no hosts. Every rank calls it; one rank a host reads.
    """
    comm = world.comm
    name = comm.bcast(f".mpillm-doctor-{secrets.token_hex(8)}" if comm.rank == 0 else None)
    left = [_leave(path / name, name) for path in paths] if comm.rank == 0 else None
    world.meet()
    written = comm.bcast(left)
    looks = [
        world.leads and there and _sees(path / name, name)
        for path, there in zip(paths, written, strict=True)
    ]
    # Rank 0 removes the file after all hosts have read it.
    world.meet()
    if comm.rank == 0:
        for path in paths:
            with suppress(OSError):
                (path / name).unlink()
    gathered = comm.allgather((world.host, looks) if world.leads else None)
    return {
        str(path): {entry[0]: entry[1][number] for entry in gathered if entry is not None}
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


def _sees(path: Path, text: str) -> bool:
    """Return whether the file can be read within LOOK_SECONDS; mostly it can at once."""
    until = time.monotonic() + LOOK_SECONDS
    while True:
        with suppress(OSError):
            # Some clients refresh their view only when the folder itself is opened.
            os.close(os.open(path.parent, os.O_RDONLY))
            if path.read_text(encoding="ascii") == text:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def judge_sharing(path: str, seen: Mapping[str, bool], asked: bool) -> Finding | None:
    """Judge one folder; `asked`: the user named it for runs and data. None without a result."""
    if not seen:
        return None
    name, blind = f"{path}: shared", [host for host, sees in seen.items() if not sees]
    if not blind:
        return Finding(AREA, name, "ok", f"the same folder on all {len(seen)} hosts")
    do = "does" if len(blind) == 1 else "do"
    found = (
        f"not the same folder on all hosts: {hosts_text(blind)} {do} not see what "
        f"{next(iter(seen))} writes there"
    )
    remedy = (
        "keep runs and data on a file system that all hosts mount (scratch, work, NFS), "
        "at the same path"
    )
    return Finding(AREA, name, "error" if asked else "warning", found, remedy)
