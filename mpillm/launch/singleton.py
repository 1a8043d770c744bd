"""Ranks that do not know of each other: the launcher of one MPI and the library of another.

Each of N such processes takes itself for a whole job, and all of them write the same files. The world's size comes
from MPI alone; the environment serves to notice the mistake, and to name its cure.

The rule: where MPI says 1 and the launcher says more, the start is refused. A process that a rank starts inherits the
launcher's variables and is refused too; whoever means N lone processes says so with MPILLM_ALONE=1.
"""

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mpillm.errors import LaunchError
from mpillm.launch import launchers
from mpillm.launch.launchers import Started, detect, number
from mpillm.launch.ranks import rank_from_environment
from mpillm.machine.mpi_names import named

ALONE_VARIABLE = "MPILLM_ALONE"
# A launcher kills the rest once a rank leaves with an error: the first rank must speak before that.
TELLING_SECONDS = 1.0

# srun's --mpi for each of them.
SLURM_MPI = {
    "Open MPI": "pmix",
    "Intel MPI": "pmi2",
    "Cray MPICH": "cray_shasta",
    "MVAPICH": "pmi2",
    "MPICH": "pmi2",
}
# What to do where a launcher of the site, not of an MPI, has started the ranks.
SITE_LAUNCHERS = {
    launchers.FLUX.name: "start Open MPI with `flux run -o pmi=pmix`, and MPICH with `flux run`",
    launchers.JSRUN.name: "build mpi4py with the MPI of jsrun's module (pip install --no-binary mpi4py mpi4py)",
    launchers.PALS.name: "build mpi4py with the site's MPICH (pip install --no-binary mpi4py mpi4py)",
}


class LonelyError(LaunchError):
    """What every process of a wrong start meets, each by itself, so that one of them may speak for all."""


def refuse_lonely_ranks(environment: Mapping[str, str], mpi_size: int, library: str) -> None:
    """Raise LonelyError when MPI's world has one process and the launcher started more.

    `library` is what MPI.Get_library_version() says. Every process calls it, before anything is written. All of them
    raise: in `one_voice` the first alone speaks.
    """
    started = detect(environment)
    if (
        mpi_size > 1
        or (started.size or 1) < 2
        or environment.get(ALONE_VARIABLE, "0") not in ("", "0")
    ):
        return
    raise LonelyError(
        f"{_command(started)} started {started.size} processes, but mpi4py loaded {named(library).text}, in which "
        f"each is alone; {cure(started, library)} ({ALONE_VARIABLE}=1 if each is meant to work by itself)"
    )


def refuse_before_init(environment: Mapping[str, str], library: str) -> None:
    """Raise LonelyError where MPI_Init would end this process without a word that helps.

    MPICH that was built without PMIx aborts in MPI_Init when it finds PMIX_RANK and no PMI_RANK, as under Open MPI's
    mpirun and srun --mpi=pmix; Open MPI 4 does under srun --mpi=none. `library` as in `refuse_lonely_ranks`; MPI tells
    it before MPI_Init too.
    """
    started = detect(environment)
    if (
        started.launcher == launchers.SRUN.name
        and started.details["mpi"] == "none"
        and named(library).text.startswith("Open MPI 4.")
    ):
        raise LonelyError(
            f"{_command(started)} tells its processes nothing of each other, and mpi4py loaded "
            f"{named(library).text}, which does not start so; {cure(started, library)}"
        )
    knows = not library.startswith("MPICH Version") or re.search(
        r"pmix|with-pmi|with-slurm", library
    )
    if knows or "PMIX_RANK" not in environment or number(environment, "PMI_RANK") is not None:
        return
    count = f"{started.size} processes" if started.size else "this process"
    raise LonelyError(
        f"{_command(started)} started {count} by PMIx, but mpi4py loaded {named(library).text}, which was built "
        f"without PMIx; {cure(started, library)}"
    )


@contextmanager
def without_foreign_warning() -> Iterator[None]:
    """Import MPI within it: mpi4py's own warning of a foreign launcher comes from each rank and names no cure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        yield


@contextmanager
def one_voice(environment: Mapping[str, str]) -> Iterator[None]:
    """Open MPI within it: a LonelyError goes on from the first rank by environment alone.

    The others wait until it has spoken and leave through SystemExit, with the same code and no word. Any other error
    may be one rank's own and goes on from there.
    """
    try:
        with without_foreign_warning():
            yield
    except LonelyError as failure:
        if rank_from_environment(environment) == 0:
            raise
        time.sleep(TELLING_SECONDS)
        raise SystemExit(failure.exit_code) from None


def cure(started: Started, library: str, maps: Path = Path("/proc/self/maps")) -> str:
    """What connects the ranks of this MPI: how to start them, or what to install instead.

    `maps`: the files that this process has loaded, which tell where this MPI lies.
    """
    family = named(library).name
    if started.launcher == launchers.SRUN.name:
        return _cure_of_srun(started.details["mpi"], family)
    if started.launcher in SITE_LAUNCHERS:
        return SITE_LAUNCHERS[started.launcher]
    own = mpirun_of(maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else "")
    return (
        f"start them with the mpirun of {family} ({own or '`which -a mpirun` lists what there is'}), or install mpi4py "
        "with the MPI of this launcher"
    )


def mpirun_of(maps: str) -> str:
    """The mpirun beside the MPI library among the loaded files of `maps` (/proc/self/maps); "" where none is found."""
    for library in re.findall(r"(/\S*/libmpi(?:ch)?\.so\S*)", maps):
        # Debian lets several MPIs share /usr, and tells their commands apart by an ending.
        names = ("mpirun.openmpi" if "openmpi" in library else "mpirun.mpich", "mpirun", "mpiexec")
        for prefix in list(Path(library).parents)[:-1]:
            for name in names:
                if (prefix / "bin" / name).is_file():
                    return str(prefix / "bin" / name)
    return ""


def _cure_of_srun(mpi: str, family: str) -> str:
    fit = SLURM_MPI.get(family, "pmix")
    if fit == mpi:
        return f"start them with mpirun inside the allocation, for this {family} does not understand Slurm's {fit}"
    needs = " and I_MPI_PMI_LIBRARY set to Slurm's libpmi2.so" if family == "Intel MPI" else ""
    return (
        f"start them with srun --mpi={fit}{needs} (srun --mpi=list shows what there is), or with mpirun inside the "
        "allocation"
    )


def _command(started: Started) -> str:
    """The launcher as the user knows it: `mpirun (Open MPI 5.0.11)`, `srun --mpi=none`."""
    if "version" in started.details:
        return started.launcher.replace(")", f" {started.details['version']})")
    return (
        f"{started.launcher} --mpi={started.details['mpi']}"
        if "mpi" in started.details
        else started.launcher
    )
