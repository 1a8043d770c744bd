"""A process that is in no job: what launchers told its parent must not reach it."""

from collections.abc import Mapping

# How launchers tell a process that it is one of a job, by the beginnings of names; a user's own settings stay.
LAUNCHERS = (
    "OMPI_COMM_",
    "OMPI_UNIVERSE_",
    "OMPI_MCA_orte",
    "OMPI_MCA_ess",
    "OMPI_MCA_pmix",
    "OMPI_APP_",
    "OMPI_FILE_",
    "OMPI_FIRST_",
    "OMPI_NUM_",
    "OMPI_ARGV",
    "OMPI_COMMAND",
    "PMIX_",
    "PRTE_",
    "PMI_",
    "HYDRA_",
    "HYDI_",
    "MPI_LOCAL",
    "I_MPI_HYDRA",
    "PMI2_",
    "MV2_COMM_",
    "MVP_COMM_",
    "SLURM_",
    "PALS_",
    "PBS_",
    "LSB_",
    "JSM_",
    "FLUX_",
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is in no job: one that starts MPI would else take the place of its parent."""
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHERS)}
