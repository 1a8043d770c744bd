"""Pages of memory: kept by this process once it has them, since to fault one in costs as much as to fill it."""

import ctypes

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_pages() -> bool:
    """From now on this process's C library keeps the memory that it frees, so that no page is faulted in twice.

    A training step frees and allocates its gradients, an MPI library room for each large call: without this they pay
    for page faults again and again (docs/notes.md). False where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    )
