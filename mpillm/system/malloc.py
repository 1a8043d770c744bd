"""Pages of memory: keep them in this process, for a page fault costs as much as a fill."""

import ctypes

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_pages() -> bool:
    """Make the C library keep the memory that it frees, so that no page is faulted in twice.

    A training step frees and allocates its gradients, and an MPI library buffers for each large
    call: both would pay for page faults each time. Returns False without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    )
