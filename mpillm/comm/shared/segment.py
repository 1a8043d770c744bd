"""Segments of node-shared memory: one file in /dev/shm, mapped by all ranks and unlinked at once.

It is POSIX shared memory, not an MPI-3 window. Without room, some MPI libraries fail on one rank
and hang the others, or die of SIGBUS at the first touch. Here each rank allocates its own part, so
its pages are near its cores, and a full /dev/shm is an error on every rank.
"""

import errno
import mmap
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mpi4py import MPI

FOLDER = Path("/dev/shm")
PAGE_BYTES = 4096
# On x86-64, and on AArch64 with 4 KiB pages. Large sums take fewer TLB misses on huge pages.
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class SharedSegment:
    """A row of bytes a rank, each on pages of its own, writable by all ranks."""

    whole: NDArray[np.uint8]
    """All of the memory, rows and padding to whole pages."""
    rows: tuple[NDArray[np.uint8], ...]
    rank: int

    @property
    def own(self) -> NDArray[np.uint8]:
        return self.rows[self.rank]


def share_segment(comm: "MPI.Intracomm", nbytes: int, folder: Path = FOLDER) -> SharedSegment | str:
    """Map rows of `nbytes` zeros for the ranks of `comm`; return on every rank why that failed.

    Every rank of `comm`, all of one node, calls it. The system frees the memory when no array
    points into it any more.
    """
    # A row long enough for huge pages begins on one, so that no two ranks share a page.
    page = HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else PAGE_BYTES
    stride = -(-max(nbytes, 1) // page) * page
    name = comm.bcast(f"mpillm-{os.getpid()}-{secrets.token_hex(8)}")
    memory, reason = _map(comm, folder / name, stride)
    reasons = [f"rank {rank}: {text}" for rank, text in enumerate(comm.allgather(reason)) if text]
    if reasons or memory is None:
        return reasons[0]
    whole: NDArray[Any] = np.frombuffer(memory, np.uint8)
    rows = [whole[rank * stride : rank * stride + nbytes] for rank in range(comm.size)]
    return SharedSegment(whole, tuple(rows), comm.rank)


def _why(failure: Exception, descriptor: int) -> str:
    """Say why the file had no memory: no room, a limit, or the system's words."""
    # A ValueError: the file is shorter than the map, or the map longer than an address.
    code = getattr(failure, "errno", None)
    if code not in (errno.ENOSPC, errno.ENOMEM):
        return str(getattr(failure, "strerror", failure))
    system, file = os.fstatvfs(descriptor), os.fstat(descriptor)
    # Other ranks may have their parts of this file already: what they hold, they give back.
    free = system.f_bavail * system.f_frsize + 512 * file.st_blocks
    if code == errno.ENOMEM and file.st_size <= free:
        return "the memory limit of the job (its control group, or `ulimit -v`) is reached"
    # A map longer than the free addresses of the process is refused before the file is full.
    return f"{free:,} are free"


def _map(comm: "MPI.Intracomm", path: Path, stride: int) -> tuple[mmap.mmap | None, str]:
    """Create the file on rank 0, open it on the others, allocate this rank's part, unlink it."""
    descriptor, reason, memory = -1, "", None
    try:
        if comm.rank == 0:
            descriptor, reason = _create(path, stride * comm.size)
        # The file exists and has its length, or no rank opens it.
        reason = comm.bcast(reason)
        if not reason and comm.rank != 0:
            descriptor, reason = _open(path, os.O_RDWR)
        if not reason:
            memory, reason = _allocate(descriptor, stride, comm)
        # All ranks have it open: from here on a killed job leaves no file.
        comm.Barrier()
    finally:
        if comm.rank == 0:
            with suppress(OSError):
                path.unlink()
        if descriptor >= 0:
            os.close(descriptor)
    return memory, reason


def _open(path: Path, flags: int) -> tuple[int, str]:
    try:
        return os.open(path, flags, 0o600), ""
    except OSError as failure:
        return -1, f"cannot open {path}: {failure.strerror}"


def _create(path: Path, nbytes: int) -> tuple[int, str]:
    """Create the file with its length; return its descriptor, and why that failed."""
    descriptor, reason = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    if not reason:
        try:
            os.ftruncate(descriptor, nbytes)
        except (OSError, OverflowError) as failure:
            # Such as EFBIG under `ulimit -f`; an overflow beyond 2^63 bytes.
            why = getattr(failure, "strerror", failure)
            reason = f"cannot make {nbytes:,} bytes of {path}: {why}"
    return descriptor, reason


def _allocate(descriptor: int, stride: int, comm: "MPI.Intracomm") -> tuple[mmap.mmap | None, str]:
    """Map the file and allocate this rank's part, in huge pages where the system allows them."""
    try:
        memory = mmap.mmap(descriptor, stride * comm.size)
        if stride % HUGE_PAGE_BYTES == 0:
            with suppress(OSError, AttributeError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        # Allocate now: a full /dev/shm is ENOSPC here, and SIGBUS at a later touch.
        os.posix_fallocate(descriptor, comm.rank * stride, stride)
    except (OSError, ValueError, OverflowError) as failure:
        what = f"{stride * comm.size:,} bytes of shared memory in {FOLDER}"
        return None, f"cannot allocate {what}: {_why(failure, descriptor)}"
    return memory, ""
