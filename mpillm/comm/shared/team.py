"""The ranks of one node as a team: collectives in memory that they share, run by the compiled kernel.

- push: arrays that lie in shared memory themselves. Each rank sums its block over all sources and writes the sum into
  every target, so each byte moves once.
- flat: small arrays, anywhere. Each rank shows a copy of its own, and each sums all copies: one wait.
- staged: arrays anywhere. Pieces pass through a small stage that all ranks see, in three steps a chunk; `team.c` tells.

All of them sum in the one tree order of `algorithms.tree_split`, so they agree bit for bit.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import kernel
from mpillm.comm.buffers import ELEMENTS, REDUCTIONS, Buffer, from_octets, itemsize_of
from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.comm.waiting import share_cores
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

KINDS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall", "barrier")
PUSHED = ("allreduce", "reduce_scatter", "allgather")
ManyRows = tuple[NDArray[np.uint8], ...] | None
# Measured in docs/notes.md: what passes between two waits stays in a core's second cache.
STAGE_BYTES = 256 * 1024
STAGE_BYTES_A_RANK = 16 * 1024
# Up to here one wait with more reading beats two waits with less.
FLAT_BYTES = 64 * 1024
FLAT_PUSH_BYTES = 512
# How often a waiting rank looks at a flag before it offers its core to others: some 10 µs where each has its own.
SPINS = 200
SPINS_CROWDED = 20


class SharedRows:
    """Node-shared memory for `count` elements a rank, the form in which sums are fastest. `own` is this rank's row.

    Every rank of the node may read and write all rows; the collectives keep order between them.
    """

    def __init__(self, rows: SharedSegment, count: int, element: str) -> None:
        """See `Node.allocate`, which finds the memory."""
        self.element, self.count = element, count
        self.octets = rows.rows
        self.rank = rows.rank
        # NumPy has no bfloat16: as_buffer and torch know these two bytes by another name.
        self._dtype = np.dtype("uint16" if element == "bfloat16" else element)

    @property
    def own(self) -> NDArray[Any]:
        """This rank's row as a NumPy array; bfloat16 as uint16."""
        return self.octets[self.rank].view(self._dtype)

    @property
    def buffer(self) -> Buffer:
        """This rank's row as the collectives take it, of its own element type."""
        return from_octets(self.octets[self.rank], self.element)

    def place_of(self, octets: NDArray[np.uint8]) -> int | None:
        """Where in this rank's row `octets` begins, in bytes; None where it lies elsewhere."""
        own = self.octets[self.rank]
        first = int(octets.ctypes.data - own.ctypes.data)
        return first if 0 <= first <= first + octets.size <= own.size else None

    def free(self) -> None:
        """Let go of the memory; it is given back when no view of it is left."""
        self.octets = ()


class NodeTeam:
    """The team of this rank's node. Every rank of `comm`, all of one node, makes it through `create`."""

    def __init__(self, comm: "MPI.Intracomm", memory: SharedSegment, stage_bytes: int) -> None:
        self.comm, self._memory = comm, memory
        self._team = kernel.Team(
            memory.whole,
            comm.rank,
            comm.size,
            stage_bytes,
            spins_of(comm),
            tuple(processes(comm)),
            CommError,
        )
        self._flat_bytes = min(FLAT_BYTES, stage_bytes)
        self._shared: list[SharedRows] = []

    @classmethod
    def create(cls, comm: "MPI.Intracomm", warn: Callable[[str], None]) -> "NodeTeam | None":
        """The team, or None on every rank where shared memory can't be had; `warn` is told why, on rank 0 of `comm`."""
        stage_bytes = max(STAGE_BYTES, STAGE_BYTES_A_RANK * comm.size)
        if comm.size > kernel.MOST_RANKS:
            memory: str | SharedSegment = (
                f"{comm.size} ranks share a node, and at most {kernel.MOST_RANKS} sum in its memory"
            )
        else:
            # The flags begin as zeros.
            memory = share_segment(comm, -(-kernel.team_bytes(comm.size, stage_bytes) // comm.size))
        if isinstance(memory, str):
            if comm.rank == 0:
                warn(
                    f"{memory}; collectives within the node fall back to messages, which is slower"
                )
            return None
        return cls(comm, memory, stage_bytes)

    def allocate(self, count: int, element: str, warn: Callable[[str], None]) -> SharedRows | None:
        """Shared memory for `count` elements a rank, or None on every rank (and a warning). Every rank calls it."""
        rows = share_segment(self.comm, count * itemsize_of(element))
        if isinstance(rows, str):
            if self.comm.rank == 0:
                warn(f"{rows}; arrays stay private to their ranks, and sums of them are slower")
            return None
        shared = SharedRows(rows, count, element)
        self._shared.append(shared)
        return shared

    def prepare(
        self,
        kind: str,
        source: Buffer | None,
        target: Buffer | None,
        op: str = "sum",
        scale: float = 1.0,
        root: int = 0,
    ) -> kernel.Operation:
        """A collective of the team, ready to run. Every rank of the node prepares the same, in the same order.

        `source` and `target` may be the same buffer. A reduce_scatter's target, and an allgather's source, is either
        the whole array or the own block alone. None: this rank gives, or takes, nothing.
        """
        given = source or target
        if given is None:
            return self._team.operation(
                KINDS.index(kind), None, None, 0, 0, 0, 1.0, root, False, None, None
            )
        # The longer of the two is the whole array.
        count = max(buffer.count for buffer in (source, target) if buffer is not None)
        nbytes = count * given.itemsize
        rows = self._rows(kind, source, target)
        if kind == "allreduce" and nbytes <= FLAT_PUSH_BYTES:
            rows = None, None
        flat = (
            kind in ("allreduce", "reduce") and nbytes <= self._flat_bytes and rows == (None, None)
        )
        return self._team.operation(
            KINDS.index(kind),
            source.octets if source else None,
            target.octets if target else None,
            count,
            ELEMENTS.index(given.element),
            REDUCTIONS.index(op),
            scale,
            root,
            flat,
            *rows,
        )

    def pushes(self, kind: str, source: Buffer, target: Buffer) -> bool:
        """Whether the arrays lie so that the stage is not needed."""
        return self._rows(kind, source, target) != (None, None)

    def _rows(
        self, kind: str, source: Buffer | None, target: Buffer | None
    ) -> tuple[ManyRows, ManyRows]:
        """All ranks' rows of the sources and of the targets that `kind` works on without the stage; else None, None."""
        if kind not in PUSHED or source is None or target is None:
            return None, None
        sources = None if kind == "allgather" else self._rows_of(source)
        targets = None if kind == "reduce_scatter" else self._rows_of(target)
        if kind == "allreduce" and (sources is None or targets is None):
            return None, None
        return sources, targets

    def place(self, buffer: Buffer) -> int | None:
        """Where in this rank's row `buffer` begins, in bytes, if it lies in memory that `allocate` gave; else None."""
        found = self._find(buffer)
        return None if found is None else found[1]

    def _rows_of(self, buffer: Buffer) -> ManyRows:
        """All ranks' rows, where `buffer` lies in shared memory (every rank passes the same part of its row)."""
        found = self._find(buffer)
        if found is None:
            return None
        shared, first = found
        return tuple(row[first : first + buffer.octets.size] for row in shared.octets)

    def _find(self, buffer: Buffer) -> tuple[SharedRows, int] | None:
        self._shared = [shared for shared in self._shared if shared.octets]
        for shared in self._shared if buffer.count else ():
            first = shared.place_of(buffer.octets)
            if first is not None:
                return shared, first
        return None


def spins_of(comm: "MPI.Intracomm") -> int:
    """How often a rank of `comm`, a node's, looks at a flag before it offers its core. Every rank calls it."""
    return SPINS_CROWDED if share_cores(comm) else SPINS


def processes(comm: "MPI.Intracomm") -> list[int]:
    """The ranks' process ids; 0 for those of another process namespace, which can't be asked for a sign of life."""
    own = Path("/proc/self/ns/pid").stat().st_ino
    return [process if space == own else 0 for process, space in comm.allgather((os.getpid(), own))]
