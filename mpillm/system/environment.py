"""The environment of a process: without its launcher's variables, and with defaults."""

import os
from collections.abc import Mapping

# Beginnings of the variables by which a launcher makes a process a rank of a job. A user's own
# settings, such as OMPI_MCA_pml, stay.
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
    """Return the environment without the launcher's variables.

    A child that starts MPI with them would take the place of its parent in the job.
    """
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHERS)}


def library_paths() -> dict[str, str]:
    """Return what a Python needs of the environment to find its own libraries, and nothing else."""
    paths = os.environ.get("LD_LIBRARY_PATH")
    return {} if paths is None else {"LD_LIBRARY_PATH": paths}


def set_default(name: str, value: str) -> None:
    """Set a variable for the libraries that this process loads, unless the user has set it."""
    os.environ.setdefault(name, value)
