"""The ranks of one node as a team: collectives in node-shared memory, run by the compiled kernel.

- push: arrays in shared memory themselves. Each rank sums its block over all sources and writes the
  sum into every target, so each byte moves once.
- flat: small arrays, anywhere. Each rank publishes a copy, and each sums all copies: one wait.
- staged: arrays anywhere. Chunks pass through a staging buffer that all ranks see, in three steps
  each; `csrc/team.c` has the protocol.

All of them sum in the tree order of `algorithms/trees.py`, so they agree bit for bit.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import kernel
from mpillm.comm.backoff import share_cores
from mpillm.comm.buffers import ELEMENTS, REDUCTIONS, Buffer, from_octets, itemsize_of
from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

# What a warning says of arrays for which there is no room.
PRIVATE = "arrays stay private to their ranks, and sums of them are slower"
# In the order of `enum kind` in team.h.
KINDS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall", "barrier")
# The kinds that can push → whether the source, and the target, must be in shared memory for it.
PUSHED = {
    "allreduce": (True, True),
    "reduce_scatter": (True, False),
    "allgather": (False, True),
}
ManyRows = tuple[NDArray[np.uint8], ...] | None
# Bytes of one half of a rank's staging buffer: a chunk stays in a core's second-level cache between
# its write and its read. The second constant keeps blocks long where many ranks share a node.
STAGING_BYTES = 256 * 1024
STAGING_BYTES_A_RANK = 16 * 1024
# Up to here one wait and more reading is faster than two waits and less reading.
FLAT_BYTES = 64 * 1024
# Below this a flat all-reduce is faster even than a push, which takes two waits.
FLAT_PUSH_BYTES = 512


class SharedRows:
    """Node-shared memory for `count` elements a rank, in which sums are fastest.

    `own` is this rank's row. Every rank of the node may read and write all rows; the collectives
    keep order between them.
    """

    def __init__(self, segment: SharedSegment, count: int, element: str) -> None:
        """See `NodeTeam.allocate`, which maps the memory."""
        self.element, self.count = element, count
        self.octets = segment.rows
        self.rank = segment.rank
        # NumPy has no bfloat16; `buffer` gives the same bytes with their own type.
        self._dtype = np.dtype("uint16" if element == "bfloat16" else element)

    @property
    def own(self) -> NDArray[Any]:
        """This rank's row as a NumPy array; bfloat16 as uint16."""
        return self.octets[self.rank].view(self._dtype)

    @property
    def buffer(self) -> Buffer:
        """This rank's row as the collectives take it, of its own element type."""
        return from_octets(self.octets[self.rank], self.element)

    def offset_of(self, octets: NDArray[np.uint8]) -> int | None:
        """Return the offset of `octets` in this rank's row, in bytes; None for other memory."""
        own = self.octets[self.rank]
        first = int(octets.ctypes.data - own.ctypes.data)
        return first if 0 <= first <= first + octets.size <= own.size else None

    def free(self) -> None:
        """Drop the memory; the system frees it when no view of it is left."""
        self.octets = ()


@dataclass(frozen=True)
class SharedPlace:
    """An array's place in node-shared memory."""

    shared: SharedRows
    first: int
    """Its offset in this rank's row, in bytes."""
    nbytes: int

    @property
    def rows(self) -> tuple[NDArray[np.uint8], ...]:
        """The same bytes of every rank's row: every rank passes the same part of its row."""
        return tuple(row[self.first : self.first + self.nbytes] for row in self.shared.octets)


@dataclass(frozen=True)
class Location:
    """The places of a collective's two arrays in node-shared memory; None for private memory."""

    source: SharedPlace | None
    target: SharedPlace | None

    @property
    def offsets(self) -> tuple[int | None, int | None]:
        """Offsets of source and target in this rank's row, in bytes."""
        return (
            None if self.source is None else self.source.first,
            None if self.target is None else self.target.first,
        )

    def pushes(self, kind: str) -> bool:
        """Return True where `kind` needs no staging buffer for these arrays."""
        if kind not in PUSHED:
            return False
        needs_source, needs_target = PUSHED[kind]
        missing = (needs_source and self.source is None) or (needs_target and self.target is None)
        return not missing

    def rows(self, kind: str) -> tuple[ManyRows, ManyRows]:
        """Return all ranks' rows of sources and targets for a push of `kind`, else None, None."""
        if not self.pushes(kind):
            return None, None
        needs_source, needs_target = PUSHED[kind]
        return (
            self.source.rows if needs_source and self.source else None,
            self.target.rows if needs_target and self.target else None,
        )


# Where no team is, and for a barrier.
NOWHERE = Location(None, None)


class NodeTeam:
    """The team of this rank's node. Every rank of `comm`, all of one node, calls `create`."""

    def __init__(self, comm: "MPI.Intracomm", memory: SharedSegment, staging_bytes: int) -> None:
        self.comm, self._memory = comm, memory
        self._team = kernel.Team(
            memory.whole,
            comm.rank,
            comm.size,
            staging_bytes,
            spins_of(comm),
            tuple(process_ids(comm)),
            CommError,
        )
        self._flat_bytes = min(FLAT_BYTES, staging_bytes)
        self._shared: list[SharedRows] = []

    @classmethod
    def create(cls, comm: "MPI.Intracomm", warn: Callable[[str], None]) -> "NodeTeam | None":
        """Make the team; None on every rank where shared memory has no room.

        Every rank of `comm` calls it. Rank 0 of `comm` calls `warn` with the reason for None.
        """
        staging_bytes = max(STAGING_BYTES, STAGING_BYTES_A_RANK * comm.size)
        if comm.size > kernel.MOST_RANKS:
            memory: str | SharedSegment = (
                f"{comm.size} ranks share a node, and at most {kernel.MOST_RANKS} sum in its memory"
            )
        else:
            # A new segment is zero, and so are the flags in it.
            team_bytes = kernel.team_bytes(comm.size, staging_bytes)
            memory = share_segment(comm, -(-team_bytes // comm.size))
        if isinstance(memory, str):
            if comm.rank == 0:
                warn(
                    f"{memory}; collectives within the node fall back to messages, which is slower"
                )
            return None
        return cls(comm, memory, staging_bytes)

    def allocate(
        self, count: int, element: str, warn: Callable[[str], None], instead: str = PRIVATE
    ) -> SharedRows | None:
        """Allocate shared memory for `count` elements a rank; None on every rank without room.

        Every rank of the node calls it. Rank 0 calls `warn` with the reason for None, and with
        what is done `instead`.
        """
        segment = share_segment(self.comm, count * itemsize_of(element))
        if isinstance(segment, str):
            if self.comm.rank == 0:
                warn(f"{segment}; {instead}")
            return None
        shared = SharedRows(segment, count, element)
        self._shared.append(shared)
        return shared

    def locate(self, source: Buffer | None, target: Buffer | None) -> Location:
        """Find both arrays in the memory that `allocate` gave; the same buffer is found once."""
        found = self._find(source)
        return Location(found, found if source is target else self._find(target))

    def _find(self, buffer: Buffer | None) -> SharedPlace | None:
        if buffer is None or not buffer.count:
            return None
        # Rows that were freed have no memory to find an array in.
        self._shared = [shared for shared in self._shared if shared.octets]
        for shared in self._shared:
            first = shared.offset_of(buffer.octets)
            if first is not None:
                return SharedPlace(shared, first, buffer.octets.size)
        return None

    def prepare(
        self,
        kind: str,
        source: Buffer | None,
        target: Buffer | None,
        op: str = "sum",
        scale: float = 1.0,
        root: int = 0,
        location: Location | None = None,
    ) -> kernel.Operation:
        """Prepare a collective of the team. Every rank of the node prepares the same, in one order.

        `source` and `target` may be the same buffer; None: this rank gives, or takes, nothing. A
        reduce_scatter's target, and an allgather's source, is the whole array or the own block.
        `location`: of the two, where the caller has it from `locate` already.
        """
        given = source or target
        if given is None:
            return self._team.operation(
                KINDS.index(kind), None, None, 0, 0, 0, 1.0, root, False, None, None
            )
        # The longer of the two is the whole array.
        count = max(buffer.count for buffer in (source, target) if buffer is not None)
        nbytes = count * given.itemsize
        rows: tuple[ManyRows, ManyRows] = (None, None)
        if source is not None and target is not None and kind in PUSHED:
            rows = (location or self.locate(source, target)).rows(kind)
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


def spins_of(comm: "MPI.Intracomm") -> int:
    """Return the polls of a flag before a rank of `comm` yields its core. Every rank calls it."""
    return int(kernel.WAITING["SPINS_CROWDED" if share_cores(comm) else "SPINS"])


def process_ids(comm: "MPI.Intracomm") -> list[int]:
    """Gather the ranks' process ids; 0 for a process that this one cannot signal.

    Process ids mean nothing in another PID namespace (a container a rank): there a dead rank is
    not detected here, only by the launcher.
    """
    own = Path("/proc/self/ns/pid").stat().st_ino
    return [process if space == own else 0 for process, space in comm.allgather((os.getpid(), own))]
