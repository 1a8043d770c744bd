"""Who started this process: what each launcher leaves in the environment of its ranks.

A table, in the order of trust: what started last is asked first. A job's outer layers stay visible in its inner ones:
mpirun inside a Slurm allocation starts its daemons with srun, and their SLURM_PROCID and SLURM_STEP_NUM_TASKS pass on
to every rank (seen with MPICH's and Intel's Hydra). So mpirun's own variables go before srun's.

Sources. Run and looked at with `env`: Open MPI 4.1 and 5.0, MPICH 5.0, Intel MPI 2021.18, and Slurm 22.05 with
--mpi=none, pmi2, pmix and cray_shasta, as with mpirun inside its allocations. From documents and sources: Open MPI,
"Environment variables set for MPI applications"; Slurm, srun(1), "output environment variables"; Flux,
flux-environment(7) and its job shell; MVAPICH2's user guide, and MVAPICH's table of parameters; the scripts and
plugins that read PALS's and jsrun's variables on the machines of ALCF and OLCF.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launcher:
    """One launcher: the names of its variables, and how it is told to give ranks more cores."""

    name: str
    """As it stands in a sentence, ahead of "started 8 processes"."""
    rank: str
    size: str = ""
    """"" where the launcher does not tell."""
    local_rank: str = ""
    marks: tuple[str, ...] = ()
    """Variables without which `rank` is another launcher's, or none's."""
    details: tuple[tuple[str, str], ...] = ()
    """What else is worth telling: its name, and the variable that holds it."""
    widen: str = ""
    """What lets a rank run on `{cores}` cores."""


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
    # The shell of a batch script has SLURM_PROCID=0 and SLURM_NTASKS too; only a step has a number of tasks.
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

# jsrun before Open MPI: its MPI is one of Open MPI's kin and sets those variables too. srun before PALS: on a Cray
# (--mpi=cray_shasta) srun sets PALS_RANKID.
LAUNCHERS = (JSRUN, OPEN_MPI, MVAPICH2, MVAPICH, INTEL, HYDRA, FLUX, SRUN, PALS, PMI, PMIX)


@dataclass(frozen=True)
class Started:
    """How this process was started, as the environment tells; all by itself where `launcher` is ""."""

    launcher: str = ""
    """The launcher's name in the table."""
    rank: int = 0
    size: int | None = None
    """The number of processes; None where the launcher does not tell."""
    local_rank: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    """`version`: of mpirun; `mpi`: srun's --mpi."""


def detect(environment: Mapping[str, str]) -> Started:
    """The launcher that started this process, and what it says of its rank.

    A hint, and no more: the world's size is MPI's to tell. A child of a rank inherits its variables and passes for it.
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


def launcher_named(name: str) -> Launcher | None:
    return next((launcher for launcher in LAUNCHERS if launcher.name == name), None)


def number(environment: Mapping[str, str], variable: str) -> int | None:
    """The whole number that a variable holds; None where it holds none."""
    text = environment.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else None


def _details(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    found = {
        name: environment[variable]
        for name, variable in launcher.details
        if environment.get(variable)
    }
    return found | ({"mpi": _slurm_mpi(environment)} if launcher is SRUN else {})


def _slurm_mpi(environment: Mapping[str, str]) -> str:
    """srun's --mpi: by what it left for the ranks, since SLURM_MPI_TYPE may also be the user's own wish."""
    if "PMIX_RANK" in environment:
        return "pmix"
    if "PMI_RANK" in environment:
        return "pmi2"
    return "cray_shasta" if "PALS_RANKID" in environment else "none"
