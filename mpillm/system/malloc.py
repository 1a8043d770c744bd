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


def release_pages() -> bool:
    """Give the free pages of the C library back to the system, where it is glibc.

    Once before work of another shape, such as an evaluation between steps: its large arrays do not
    fit into the gaps that the steps left, and both would count. Pages that are used again are
    faulted in again, 0.1 s for a GiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
