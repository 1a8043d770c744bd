"""PMIx, by which Open MPI's ranks find one another: a barrier before their first message."""

import ctypes
import os
from contextlib import suppress

LIBRARY = "libpmix.so.2"
# What PMIx 4 and 5 call pmix_info_t has 544 bytes: a key of 512, flags and a value.
INFO_BYTES = 1024
COLLECT_DATA, BOOL = b"pmix.collect", 1


def wait_until_all_began(ranks: int) -> None:
    """Wait until MPI_Init has returned on all `ranks` of MPI_COMM_WORLD; a lone rank returns.

    Each rank calls it after its own MPI_Init, before its first message.

    A message that reaches a rank of Open MPI 5 within MPI_Init may end it by SIGSEGV: issue 12495
    and pull request 13559 of github.com/open-mpi/ompi. A PMIx barrier at the
    end of MPI_Init should prevent that. Slurm's mpi/pmix makes none between nodes unless the fence
    collects data, so this one does.

    Returns at once without PMIx: the fault is not known of other libraries.
    """
    if ranks == 1:
        return
    with suppress(OSError, AttributeError):
        pmix = ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD)
        info, yes = ctypes.create_string_buffer(INFO_BYTES), ctypes.c_bool(True)
        if pmix.PMIx_Info_load(info, COLLECT_DATA, ctypes.byref(yes), ctypes.c_uint16(BOOL)) == 0:
            pmix.PMIx_Fence(None, ctypes.c_size_t(0), info, ctypes.c_size_t(1))
