"""mpirun: whether the first one on PATH belongs to the MPI library that mpi4py loads."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpillm.doctor.check_base import Check, JobView
from mpillm.doctor.checks.loaded_mpi import AREA, INSTALL
from mpillm.doctor.findings import Finding, Verdict
from mpillm.doctor.mpi_look import MpiLook
from mpillm.doctor.subprocesses import run_child
from mpillm.machine.mpi_names import UNKNOWN, MpiName, named

# Programs other than mpirun that start ranks.
STARTERS = ("srun", "jsrun", "flux", "aprun")
MPIRUN_SECONDS = 20.0


@dataclass(frozen=True)
class Mpirun:
    """The first mpirun on PATH, and its library."""

    path: str = ""
    library: MpiName = UNKNOWN


class MpirunCheck(Check):
    name, area = "mpirun", AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        others = has_starter(job.environment)
        return [judge_mpirun(job.look, find_mpirun(job.environment), others, job.ranks > 1)]


def has_starter(environment: Mapping[str, str]) -> bool:
    """Return whether another program than mpirun can start ranks."""
    return any(shutil.which(name, path=environment.get("PATH", "")) for name in STARTERS)


def find_mpirun(environment: Mapping[str, str]) -> Mpirun:
    path = environment.get("PATH", "")
    mpirun = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if mpirun is None:
        return Mpirun()
    try:
        ended = run_child([mpirun, "--version"], environment, MPIRUN_SECONDS)
    except OSError:
        return Mpirun(mpirun)
    return Mpirun(mpirun, named(ended.out + ended.err))


def judge_mpirun(found: MpiLook, mpirun: Mpirun, others: bool, started: bool) -> Finding:
    """Judge whether the mpirun on PATH fits mpi4py's library.

    `others`: srun or a similar program is there. `started`: a launcher that fits has started this
    job, so that PATH's mpirun matters for the next start alone.
    """
    name, library = "mpirun", found.library
    if not mpirun.path:
        if others or started:
            return Finding(AREA, name, "ok", "none on PATH; the batch system starts the ranks")
        alone = "none on PATH, so mpillm runs on one rank only"
        return Finding(AREA, name, "warning", alone, INSTALL)
    text = f"{mpirun.path} is of {mpirun.library.text}"
    if not library.family or not mpirun.library.family:
        return Finding(AREA, name, "ok", text)
    own = f" ({found.mpirun})" if found.mpirun else ""
    remedy = f"put the mpirun of {library.text}{own} first on PATH, or load its module and no other"
    both = f"{text}, mpi4py's library is {library.text}"
    if mpirun.library.family != library.family:
        verdict: Verdict = "warning" if started else "error"
        return Finding(AREA, name, verdict, f"{both}: each rank would be alone", remedy)
    if mpirun.library.name == library.name and _major(mpirun.library) != _major(library):
        return Finding(AREA, name, "warning", both, remedy)
    return Finding(AREA, name, "ok", text)


def _major(library: MpiName) -> str:
    return library.version.partition(".")[0]
