"""Memory that the ranks of a node share: one file in /dev/shm, mapped by all and unlinked at once.

POSIX shared memory and not an MPI-3 window: where the room is missing, some MPI libraries fail on one rank and let the
others wait for ever, or die of SIGBUS at the first touch. Here each rank allocates its own part, so its pages lie near
its cores, and a full /dev/shm is an error that all ranks hear of.
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
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class SharedSegment:
    """One row of bytes a rank, each on pages of its own; `rows[rank]` is that rank's, writable by all."""

    whole: NDArray[np.uint8]
    """All of the memory, rows and what fills their pages up."""
    rows: tuple[NDArray[np.uint8], ...]
    rank: int

    @property
    def own(self) -> NDArray[np.uint8]:
        return self.rows[self.rank]


def share_segment(comm: "MPI.Intracomm", nbytes: int, folder: Path = FOLDER) -> SharedSegment | str:
    """Rows of `nbytes` zeros for the ranks of `comm`, which share a node; or, on every rank, why they can't be had.

    Every rank of `comm` calls it. The memory is given back when no array points into it any more.
    """
    # A row that can have huge pages begins on one.
    page = HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else PAGE_BYTES
    stride = -(-max(nbytes, 1) // page) * page
    path = folder / comm.bcast(f"mpillm-{os.getpid()}-{secrets.token_hex(8)}")
    memory, reason = _map(comm, path, stride)
    reasons = [f"rank {rank}: {text}" for rank, text in enumerate(comm.allgather(reason)) if text]
    if reasons or memory is None:
        return reasons[0]
    whole: NDArray[Any] = np.frombuffer(memory, np.uint8)
    rows = [whole[rank * stride : rank * stride + nbytes] for rank in range(comm.size)]
    return SharedSegment(whole, tuple(rows), comm.rank)


def _map(comm: "MPI.Intracomm", path: Path, stride: int) -> tuple[mmap.mmap | None, str]:
    """Make the file on rank 0, open it on the others, allocate this rank's part, unlink it: each step on all ranks."""
    descriptor, reason, memory = -1, "", None
    try:
        try:
            if comm.rank == 0:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                os.ftruncate(descriptor, stride * comm.size)
            comm.Barrier()
            if comm.rank != 0:
                descriptor = os.open(path, os.O_RDWR)
        except OSError as failure:
            if comm.rank == 0:
                comm.Barrier()
            reason = f"cannot open {path}: {failure.strerror}"
        else:
            memory, reason = _allocate(descriptor, stride, comm)
        # Whoever could open it has it now; a job that is killed leaves nothing behind.
        comm.Barrier()
    finally:
        if comm.rank == 0:
            with suppress(OSError):
                path.unlink()
        if descriptor >= 0:
            os.close(descriptor)
    return memory, reason


def _allocate(descriptor: int, stride: int, comm: "MPI.Intracomm") -> tuple[mmap.mmap | None, str]:
    """Map the file, and have the pages of this rank's part, by huge pages where the system grants them."""
    try:
        memory = mmap.mmap(descriptor, stride * comm.size)
        if stride % HUGE_PAGE_BYTES == 0:
            with suppress(OSError, AttributeError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        os.posix_fallocate(descriptor, comm.rank * stride, stride)
    except OSError as failure:
        full = failure.errno in (errno.ENOSPC, errno.ENOMEM)
        what = "no room left" if full else failure.strerror
        return None, f"{stride:,} bytes of shared memory in {FOLDER} cannot be had: {what}"
    return memory, ""
