"""All-reduce inside a node, in memory that its ranks share: each byte is moved once, and no message carries it.

Each rank has a row of an MPI-3 shared window (MPI 4.1, section 12.2.3) and sees all rows. Each sums its own block over
all rows and writes the sum into every row; a fence before says that the rows are full, one behind that the sums are
there. docs/notes.md has the figures beside the ring and the library's own.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.algorithms import block_bounds

if TYPE_CHECKING:
    from mpi4py import MPI

# A piece of a few rows stays in a core's cache between being summed and being written out.
PIECE_BYTES = 128 * 1024
# Where MPI libraries on Linux keep the memory of a window; in many containers it is small.
MEMORY_FILES = Path("/dev/shm")
MARGIN = 1.25


class SharedRows:
    """One row of `count` numbers a rank, all in one window. Every rank of the communicator, which is of one node."""

    def __init__(self, comm: "MPI.Intracomm", window: "MPI.Win", count: int, dtype: np.dtype[Any]) -> None:
        """See `share`, which makes the window."""
        self._comm, self._window = comm, window
        memories: list[Any] = [window.Shared_query(rank)[0] for rank in range(comm.size)]
        self.rows: list[NDArray[Any]] = [np.frombuffer(memory, dtype, count) for memory in memories]
        window.Lock_all()
        # Touched first by its owner, so that its pages lie near the owner's cores.
        self.own.fill(0)
        self._fence()

    @classmethod
    def share(cls, comm: "MPI.Intracomm", count: int, dtype: np.dtype[Any]) -> Self | None:
        """Rows of zeros, or None on every rank where the node has no room for them. Every rank of `comm` calls it."""
        from mpi4py import MPI

        # Looked up first: where the room is missing, Open MPI fails on one rank and lets the others wait for ever.
        nbytes = count * dtype.itemsize
        if not comm.allreduce(free_bytes() >= MARGIN * nbytes * comm.size, MPI.LAND):
            return None
        return cls(comm, MPI.Win.Allocate_shared(nbytes, dtype.itemsize, comm=comm), count, dtype)

    @property
    def own(self) -> NDArray[Any]:
        """This rank's row."""
        return self.rows[self._comm.rank]

    def allreduce(self) -> None:
        """Replace every row by the sum of all, added in rank order: the same bits on each rank. Every rank calls it."""
        self._fence()
        bounds = block_bounds(len(self.own), self._comm.size)
        first, stop = bounds[self._comm.rank], bounds[self._comm.rank + 1]
        step = PIECE_BYTES // self.own.itemsize
        for start in range(first, stop, step):
            piece = slice(start, min(start + step, stop))
            total = self.rows[0][piece]
            for row in self.rows[1:]:
                np.add(total, row[piece], out=total)
            for row in self.rows[1:]:
                row[piece] = total
        self._fence()

    def _fence(self) -> None:
        """All that any rank wrote before is seen by every rank behind: barrier and memory barriers in one."""
        self._window.Sync()
        self._comm.Barrier()
        self._window.Sync()

    def free(self) -> None:
        """Give the memory back; no view of a row may be used from here on. Every rank calls it."""
        self.rows = []
        self._window.Unlock_all()
        self._window.Free()


def free_bytes() -> int:
    """The room for shared memory on this node."""
    return shutil.disk_usage(MEMORY_FILES).free if MEMORY_FILES.is_dir() else 0
