"""Launchers: which one started this process, its rank, and whether its output ends at a terminal.

The table's order is the order of trust: the launcher that started last comes first. A job's outer
layers stay visible in its inner ones. mpirun inside a Slurm allocation starts its daemons with
srun, and their SLURM_PROCID and SLURM_STEP_NUM_TASKS reach every rank (seen with MPICH's and
Intel's Hydra). So mpirun's own variables go before srun's.

Sources. Started and printed with `env`: Open MPI 4.1 and 5.0, MPICH 5.0, Intel MPI 2021.18, Slurm
22.05 with --mpi=none, pmi2, pmix and cray_shasta, and mpirun inside its allocations. From documents
and sources: Open MPI, "Environment variables set for MPI applications"; Slurm, srun(1), "output
environment variables"; Flux, flux-environment(7) and its job shell; MVAPICH2's user guide, and
MVAPICH's table of parameters; the scripts and plugins that read the variables of PALS and jsrun on
the machines of ALCF and OLCF.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Launcher:
    """A launcher: the names of its variables, and its option that gives ranks more cores."""

    name: str
    """Its name in a sentence, before "started 8 processes"."""
    rank: str
    size: str = ""
    """"" where the launcher sets no such variable."""
    local_rank: str = ""
    marks: tuple[str, ...] = ()
    """Variables without which `rank` is another launcher's, or none's."""
    details: tuple[tuple[str, str], ...] = ()
    """Further facts: a name, and the variable that holds it."""
    widen: str = ""
    """The option that lets a rank run on `{cores}` cores."""


OPEN_MPI = Launcher(
    name="mpirun (Open MPI)",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    details=(("version", "OMPI_VERSION"),),
    widen="start with --bind-to none or --map-by slot:PE={cores}",
)
HYDRA = Launcher(
    name="mpirun (MPICH's Hydra)",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    # srun --mpi=pmi2, Flux and PALS set PMI_RANK too.
    marks=("MPI_LOCALRANKID",),
    widen="start with -bind-to none",
)
INTEL = Launcher(
    name="mpirun (Intel MPI's Hydra)",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    marks=("MPI_LOCALRANKID", "I_MPI_HYDRA_UUID"),
    widen="start with I_MPI_PIN=off",
)
MVAPICH2 = Launcher(
    name="mpirun (MVAPICH2)",
    rank="MV2_COMM_WORLD_RANK",
    size="MV2_COMM_WORLD_SIZE",
    local_rank="MV2_COMM_WORLD_LOCAL_RANK",
    widen="start with MV2_ENABLE_AFFINITY=0",
)
MVAPICH = Launcher(
    name="mpirun (MVAPICH)",
    rank="MVP_COMM_WORLD_RANK",
    size="MVP_COMM_WORLD_SIZE",
    local_rank="MVP_COMM_WORLD_LOCAL_RANK",
    widen="start with MVP_ENABLE_AFFINITY=0",
)
JSRUN = Launcher(
    name="jsrun",
    rank="JSM_NAMESPACE_RANK",
    size="JSM_NAMESPACE_SIZE",
    local_rank="JSM_NAMESPACE_LOCAL_RANK",
    widen="start with --bind none or --cpu_per_rs {cores}",
)
FLUX = Launcher(
    name="flux run",
    rank="FLUX_TASK_RANK",
    size="FLUX_JOB_SIZE",
    local_rank="FLUX_TASK_LOCAL_ID",
    widen="start with --cores-per-task={cores} or -o cpu-affinity=off",
)
SRUN = Launcher(
    name="srun",
    rank="SLURM_PROCID",
    # The shell of a batch script has SLURM_PROCID=0 and SLURM_NTASKS too; only a step has this.
    size="SLURM_STEP_NUM_TASKS",
    local_rank="SLURM_LOCALID",
    marks=("SLURM_STEP_NUM_TASKS",),
    widen="start with --cpus-per-task={cores} or --cpu-bind=none",
)
PALS = Launcher(
    name="mpiexec (Cray PALS)",
    rank="PALS_RANKID",
    size="PMI_SIZE",
    local_rank="PALS_LOCAL_RANKID",
    widen="start with --depth={cores} or --cpu-bind=none",
)
PMI = Launcher(name="a PMI launcher", rank="PMI_RANK", size="PMI_SIZE")
PMIX = Launcher(name="a PMIx launcher", rank="PMIX_RANK")

# jsrun before Open MPI: its MPI descends from Open MPI and sets those variables too.
# srun before PALS: on a Cray (--mpi=cray_shasta) srun sets PALS_RANKID.
LAUNCHERS = (JSRUN, OPEN_MPI, MVAPICH2, MVAPICH, INTEL, HYDRA, FLUX, SRUN, PALS, PMI, PMIX)


# In the order of trust.
RANK_VARIABLES = tuple(dict.fromkeys(launcher.rank for launcher in LAUNCHERS))


@dataclass(frozen=True)
class Started:
    """The start of this process, by its environment; `launcher` is "" without a launcher."""

    launcher: str = ""
    """The launcher's name in the table."""
    rank: int = 0
    size: int | None = None
    """The number of processes; None where the launcher sets none."""
    local_rank: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    """`version`: of mpirun; `mpi`: srun's --mpi."""


def detect(environment: Mapping[str, str]) -> Started:
    """Find the launcher that started this process, and the rank that it gave.

    This is a hint: the world's size comes from MPI. A child of a rank inherits its variables.
    """
    for launcher in LAUNCHERS:
        rank = number(environment, launcher.rank)
        if rank is not None and all(mark in environment for mark in launcher.marks):
            return Started(
                launcher=launcher.name,
                rank=rank,
                size=number(environment, launcher.size),
                local_rank=number(environment, launcher.local_rank),
                details=_details(launcher, environment),
            )
    return Started()


def rank_from_environment(environment: Mapping[str, str]) -> int:
    """Return this process's rank before MPI is loaded; 0 without a launcher.

    With it `--help` is printed once and not by N ranks.
    """
    return detect(environment).rank


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started several processes, of which this is not the first.

    A rank without a size above 1 may be left over from another program: it silences nobody.
    """
    started = detect(environment)
    return started.rank > 0 and (started.size or 1) > 1


def watched(environment: Mapping[str, str]) -> bool:
    """Return whether this process's output ends at a terminal, where a redrawn bar helps.

    Open MPI gives each rank a pseudo-terminal even where mpirun's own output goes to a file. So
    under a launcher the parent's output decides.
    """
    if not os.isatty(1):
        return False
    if not any(variable in environment for variable in RANK_VARIABLES):
        return True
    try:
        output = str(Path(f"/proc/{os.getppid()}/fd/1").readlink())
    except OSError:
        return False
    return output.startswith(("/dev/pts/", "/dev/tty"))


def launcher_named(name: str) -> Launcher | None:
    return next((launcher for launcher in LAUNCHERS if launcher.name == name), None)


def number(environment: Mapping[str, str], variable: str) -> int | None:
    """Read the whole number that a variable holds; None where it holds none."""
    text = environment.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else None


def _details(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    found = {
        name: environment[variable]
        for name, variable in launcher.details
        if environment.get(variable)
    }
    return found | ({"mpi": _srun_mpi(environment)} if launcher is SRUN else {})


def _srun_mpi(environment: Mapping[str, str]) -> str:
    """Infer srun's --mpi from the variables of the ranks.

    SLURM_MPI_TYPE does not serve: it may be the user's own default, which an option overrode.
    """
    if "PMIX_RANK" in environment:
        return "pmix"
    if "PMI_RANK" in environment:
        return "pmi2"
    return "cray_shasta" if "PALS_RANKID" in environment else "none"
