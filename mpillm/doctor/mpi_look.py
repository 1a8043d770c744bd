"""The MPI library that mpi4py finds, and whether it starts: tried in a child process.

MPI itself may be the fault, and MPI_Init ends a process that it refuses.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpillm.doctor.subprocesses import Ended, trial
from mpillm.errors import LaunchError
from mpillm.machine.mpi_names import UNKNOWN, MpiName, mpirun_of, named
from mpillm.system.lone_mpi import lone_environment

# Both load MPI from a file system that may be cold.
LOOK_SECONDS, INIT_SECONDS = 60.0, 60.0


@dataclass(frozen=True)
class MpiLook:
    """The library that mpi4py finds, or why it has none."""

    library: MpiName = UNKNOWN
    mpi4py: str = ""
    failure: str = ""
    """Why there is no library, or why it does not start."""
    thread_level: int | None = None
    """Known once MPI has been started."""
    version: str = ""
    """The whole text of MPI_Get_library_version."""
    mpirun: str = ""
    """The mpirun of the same installation."""


def look_at_mpi(environment: Mapping[str, str], start: bool = False) -> MpiLook:
    """Find the MPI library in a child that is in no job; with `start` call MPI_Init there too.

    `environment` must not hold a launcher's variables.
    """
    if not start:
        return look_of(trial("mpi_child", ["look"], environment, LOOK_SECONDS))
    try:
        with lone_environment(environment) as changed:
            return look_of(trial("mpi_child", ["init"], changed, INIT_SECONDS))
    except LaunchError as failure:
        return MpiLook(failure=str(failure))


def look_of(ended: Ended) -> MpiLook:
    """Read the output of the child."""
    found: dict[str, Any] = {}
    for line in ended.out.splitlines():
        if line.startswith(('{"mpi4py"', '{"thread_level"')):
            found |= json.loads(line)
    failure = "" if ended.code == 0 else ended.how
    if not found:
        # Python prints its exception in the last line of a traceback.
        lines = [
            line for line in ended.err.splitlines() if re.match(r"\w+(Error|Exception)\b", line)
        ]
        raised = bool(lines) and ended.code == 1
        return MpiLook(failure=lines[-1] if raised else f"the process that tried it {failure}")
    return MpiLook(
        named(found["library"]),
        found["mpi4py"],
        failure,
        found.get("thread_level"),
        found["library"],
        mpirun_of(found["files"]),
    )
