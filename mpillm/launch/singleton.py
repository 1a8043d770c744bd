"""Refuse singleton starts: N ranks of one MPI's launcher, each a world of its own in another MPI.

Each of N such processes takes itself for a whole job, and all of them write the same files. The
world's size comes from MPI alone; the environment shows the mistake, and names its cure.

The rule: where MPI counts 1 rank and the launcher more, the start is refused. A child process of a
rank inherits the launcher's variables and is refused too. MPILLM_ALONE=1 allows N lone processes.
"""

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.launch import launchers
from mpillm.launch.launchers import Started, detect, number, rank_from_environment
from mpillm.machine.mpi_names import mpirun_of, named

ALONE_VARIABLE = "MPILLM_ALONE"
# A launcher kills the job once a rank leaves with an error: rank 0 must have printed by then.
PRINT_SECONDS = 1.0

# The value of srun's --mpi for each library.
SRUN_MPI = {
    "Open MPI": "pmix",
    "Intel MPI": "pmi2",
    "Cray MPICH": "cray_shasta",
    "MVAPICH": "pmi2",
    "MPICH": "pmi2",
}
# The cure where the ranks were started by a launcher of the site and not by one of an MPI.
_MPI4PY = "(pip install --no-binary mpi4py mpi4py)"
SITE_LAUNCHERS = {
    launchers.FLUX.name: "start Open MPI with `flux run -o pmi=pmix`, and MPICH with `flux run`",
    launchers.JSRUN.name: f"build mpi4py with the MPI of jsrun's module {_MPI4PY}",
    launchers.PALS.name: f"build mpi4py with the site's MPICH {_MPI4PY}",
}


class LonelyError(LaunchError):
    """A wrong start that every process meets by itself, so that rank 0 can report it for all."""


def refuse_lonely_ranks(environment: Mapping[str, str], mpi_size: int, library: str) -> None:
    """Raise LonelyError when MPI's world has one process and the launcher started more.

    `library` is the text of MPI.Get_library_version(). Every process calls it, before anything is
    written. All of them raise: in `one_voice` rank 0 alone prints.
    """
    started = detect(environment)
    allowed = environment.get(ALONE_VARIABLE, "0") not in ("", "0")
    if mpi_size > 1 or (started.size or 1) < 2 or allowed:
        return
    raise LonelyError(
        f"{_command(started)} started {started.size} processes, but mpi4py loaded "
        f"{named(library).text}, in which each is alone; {cure(started, library)} "
        f"({ALONE_VARIABLE}=1 if each is meant to work by itself)"
    )


def refuse_before_init(environment: Mapping[str, str], library: str) -> None:
    """Raise LonelyError where MPI_Init would end this process without a useful message.

    `library` is the text of MPI.Get_library_version(), which needs no MPI_Init. Open MPI 4 aborts
    under srun --mpi=none. An MPICH without PMIx aborts where PMIX_RANK is set and PMI_RANK is not,
    as Open MPI's mpirun and srun --mpi=pmix leave them.
    """
    started, text = detect(environment), named(library).text
    by_srun = started.launcher == launchers.SRUN.name and started.details["mpi"] == "none"
    if by_srun and text.startswith("Open MPI 4."):
        raise LonelyError(
            f"{_command(started)} gives its processes no way to find each other, and mpi4py loaded "
            f"{text}, which does not start so; {cure(started, library)}"
        )
    knows = not library.startswith("MPICH Version") or re.search(
        r"pmix|with-pmi|with-slurm", library
    )
    if knows or "PMIX_RANK" not in environment or number(environment, "PMI_RANK") is not None:
        return
    count = f"{started.size} processes" if started.size else "this process"
    raise LonelyError(
        f"{_command(started)} started {count} by PMIx, but mpi4py loaded {text}, which was built "
        f"without PMIx; {cure(started, library)}"
    )


@contextmanager
def without_foreign_warning() -> Iterator[None]:
    """Silence mpi4py's own warning of a foreign launcher while the block imports MPI.

    That warning comes from each rank and names no cure.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        yield


@contextmanager
def one_voice(environment: Mapping[str, str]) -> Iterator[None]:
    """Let a LonelyError of the block leave rank 0 alone, by the rank of the environment.

    The other ranks wait until rank 0 has printed, and leave through SystemExit with the same code
    and no message. Any other error may be one rank's own and leaves from there.
    """
    try:
        with without_foreign_warning():
            yield
    except LonelyError as failure:
        if rank_from_environment(environment) == 0:
            raise
        time.sleep(PRINT_SECONDS)
        raise SystemExit(failure.exit_code) from None


def cure(started: Started, library: str, maps: Path = Path("/proc/self/maps")) -> str:
    """Describe the start, or the installation, that connects the ranks of this MPI.

    `maps` lists the files that this process has loaded: there the MPI library is found.
    """
    family = named(library).name
    if started.launcher == launchers.SRUN.name:
        return _cure_of_srun(started.details["mpi"], family)
    if started.launcher in SITE_LAUNCHERS:
        return SITE_LAUNCHERS[started.launcher]
    own = mpirun_of(maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else "")
    return (
        f"start them with the mpirun of {family} ({own or '`which -a mpirun` lists what there is'})"
        ", or install mpi4py with the MPI of this launcher"
    )


def _cure_of_srun(mpi: str, family: str) -> str:
    fit = SRUN_MPI.get(family, "pmix")
    if fit == mpi:
        return (
            "start them with mpirun inside the allocation, for this "
            f"{family} does not understand Slurm's {fit}"
        )
    pmi2 = " and I_MPI_PMI_LIBRARY set to Slurm's libpmi2.so" if family == "Intel MPI" else ""
    return (
        f"start them with srun --mpi={fit}{pmi2} (srun --mpi=list shows what there is), "
        "or with mpirun inside the allocation"
    )


def _command(started: Started) -> str:
    """Write the launcher as users know it: `mpirun (Open MPI 5.0.11)`, `srun --mpi=none`."""
    if "version" in started.details:
        return started.launcher.replace(")", f" {started.details['version']})")
    if "mpi" in started.details:
        return f"{started.launcher} --mpi={started.details['mpi']}"
    return started.launcher
