"""What the environment tells of this process before MPI is loaded."""

from collections.abc import Mapping

# Open MPI, MPICH and Intel MPI (Hydra), Cray PALS, Slurm; in the order of trust.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK", "SLURM_PROCID")


def rank_from_environment(environment: Mapping[str, str]) -> int:
    """This process's rank as its launcher tells it, 0 where none does: so that `--help` is not said N times."""
    for variable in RANK_VARIABLES:
        if environment.get(variable, "").isdigit():
            return int(environment[variable])
    return 0
