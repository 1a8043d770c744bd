"""Slots of node-shared memory for whole streams, which the ranks of a node choose alike."""

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.shared.segment import SharedSegment, share_segment

if TYPE_CHECKING:
    from mpi4py import MPI

Octets = NDArray[np.uint8]
# A flag for each slot, in a row that every rank has: two slots for each of 64 layers of 32
# microbatches in flight.
MOST_SLOTS = 4096
# Two numbers of slots in turns, ahead of the flags of rank 0: it names a slot while others still
# read the name of the one before.
NAMED_BYTES = 16


class SlotPool:
    """Slots of `nbytes` each. Every rank of one node makes it, and takes slots in the same order.

    A rank uses a slot until its last tensor in it is freed, whatever keeps that: autograd, a
    recomputation, or half of a split backward pass. When this happens may differ between ranks, as
    garbage collection does. So each rank has a flag for each slot, in shared memory, and rank 0
    alone chooses: ahead of a barrier it names the slot of the next stream, one that no rank uses.
    A flag that it finds cleared was cleared ahead of the same barrier, after the rank's last read
    of the slot. No rank writes into the slot before that barrier has ended.
    """

    def __init__(self, comm: "MPI.Intracomm", nbytes: int, control: SharedSegment) -> None:
        """See `create`, which maps the memory of the flags."""
        self._comm, self._nbytes = comm, nbytes
        self._flags = [row[NAMED_BYTES:] for row in control.rows]
        self._named = control.rows[0][:NAMED_BYTES].view(np.int64)
        self._slots: list[SharedSegment] = []
        self._turn = 0
        self.fault = ""
        """Why there can be no more slots."""

    @classmethod
    def create(cls, comm: "MPI.Intracomm", nbytes: int) -> "SlotPool | str":
        """Make a pool without slots; return on every rank why that failed."""
        control = share_segment(comm, NAMED_BYTES + MOST_SLOTS)
        return control if isinstance(control, str) else cls(comm, nbytes, control)

    def __len__(self) -> int:
        return len(self._slots)

    def take(self, dtype: Any) -> NDArray[Any] | None:
        """Return the next slot as a flat array of `dtype`; None where there is no room for one.

        It is in use until the array, and what shares its memory through it, is freed.
        """
        number = int(self._named[self._turn])
        if number == len(self._slots) and not self._add():
            return None
        taken: NDArray[Any] = self._slots[number].whole[: self._nbytes].view(dtype)
        own = self._flags[self._comm.rank]
        own[number] = 1
        # Not at exit: the memory may be unmapped by then.
        weakref.finalize(taken, _clear, own, number).atexit = False
        return taken

    def name_next(self) -> None:
        """Name the slot that all ranks take next. Each rank calls it ahead of a barrier."""
        self._turn = 1 - self._turn
        if self._comm.rank == 0:
            used = np.zeros(len(self._slots) + 1, np.uint8)
            for flags in self._flags:
                used |= flags[: len(used)]
            self._named[self._turn] = int(used.argmin())

    def _add(self) -> bool:
        """Map one more slot; return whether there was room. Every rank calls it."""
        if len(self._slots) + 1 >= MOST_SLOTS:
            self.fault = f"all {MOST_SLOTS:,} slots of shared memory are in use"
        if self.fault:
            return False
        # The rows of all ranks follow each other: together they hold one stream.
        slot = share_segment(self._comm, -(-self._nbytes // self._comm.size))
        if isinstance(slot, str):
            self.fault = slot
            return False
        self._slots.append(slot)
        return True


def _clear(flags: Octets, number: int) -> None:
    flags[number] = 0
