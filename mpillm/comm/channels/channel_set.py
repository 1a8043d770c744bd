"""Mail: arrays handed over from rank to rank along edges that are known ahead, while both ranks compute.

    mail = Mail(comm, [Edge(0, 1, nbytes), Edge(1, 0, nbytes)])
    mail.send(0, array)                      # rank 0: begins, and goes on computing
    mail.expect(0, array); …; mail.wait(0)   # rank 1: posted ahead; then it is filled

MPI hands a large message over when both ends are inside MPI (the rendezvous protocol), so a receiver waits until the
sender's computation ends. Within a node messages therefore go through mailboxes in shared memory: the sender copies
into a slot and goes on, the receiver copies out, and neither needs the other to be there. Between nodes they go by
MPI, receives posted ahead, and a thread moves them on.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from mpillm.comm.buffers import as_buffer
from mpillm.comm.channels.channel import Channel, HandoverProfile, Way, check_edges
from mpillm.comm.channels.endpoints import (
    Endpoint,
    Incoming,
    MessagesIncoming,
    MessagesOutgoing,
    Octets,
    Outgoing,
    SharedIncoming,
    SharedOutgoing,
)
from mpillm.comm.channels.setup import open_ways
from mpillm.comm.communicator import silent
from mpillm.comm.kernel import SpscQueue
from mpillm.comm.progress_thread import ProgressThread
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Channel", "ChannelSet"]

AnyEnd = TypeVar("AnyEnd", bound=Endpoint)
# How long this rank may look at one mailbox alone before the other edges get their turn.
SLICE_SECONDS = 0.05
# Who has waited so long may oversleep a little, and after the longer time asks whether the other rank still lives.
PATIENCE_SECONDS, SUSPICION_SECONDS = 0.01, 0.5
# Not after each look: where an MPI library moves a message on by a small piece a look, naps would be most of its time.
NAP_SECONDS, LOOKS_A_NAP = 50e-6, 16
# How long the thread that moves messages on sleeps between two looks.
PROGRESS_SECONDS = 1e-3


class ChannelSet:
    """Hands arrays over along `edges`, each named by its number. Every rank of `comm`, which is duplicated, makes it
    with the same edges.

    `way`: "shared" or "messages" for all edges; "auto" takes shared memory within a node, unless `profile` knows
    better. `warn` is told, on rank 0, where there is no room in shared memory; then all edges go by messages.

    Arrays are C-contiguous NumPy arrays or torch CPU tensors. Raises CommError, on every rank, for edges that differ
    between ranks and for shared memory that was asked for and cannot be had.
    """

    ways: list[Way]
    """Which way each edge goes."""

    def __init__(
        self,
        comm: "MPI.Intracomm",
        edges: Sequence[Channel],
        *,
        way: str = "auto",
        profile: HandoverProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        check_edges(comm, edges, way)
        self.edges, self.rank = tuple(edges), comm.rank
        self.ways, boxes = open_ways(comm, self.edges, way, profile, warn)
        self._comm: MPI.Intracomm = comm.Dup()
        self._outgoing = {
            n: self._outgoing_end(n, boxes)
            for n, edge in enumerate(edges)
            if edge.sender == self.rank
        }
        self._incoming = {
            n: self._incoming_end(n, boxes)
            for n, edge in enumerate(edges)
            if edge.receiver == self.rank
        }
        ends: list[Endpoint] = [*self._outgoing.values(), *self._incoming.values()]
        self._messages = [
            end for end in ends if isinstance(end, MessagesIncoming | MessagesOutgoing)
        ]
        self._thread = (
            ProgressThread(_Moving(self._messages), PROGRESS_SECONDS) if self._messages else None
        )

    def _outgoing_end(self, number: int, boxes: Mapping[int, SpscQueue]) -> Outgoing:
        if number in boxes:
            return SharedOutgoing(boxes[number])
        return MessagesOutgoing(self._comm, self.edges[number].receiver, number)

    def _incoming_end(self, number: int, boxes: Mapping[int, SpscQueue]) -> Incoming:
        if number in boxes:
            return SharedIncoming(boxes[number])
        return MessagesIncoming(self._comm, self.edges[number].sender, number)

    def send(self, edge: int, array: Any) -> None:
        """Begin to send `array` to the edge's receiver, and return. It must not change until `drain` has returned."""
        end, octets = (
            self._own(self._outgoing, edge, "sender"),
            self._octets(edge, array, writable=False),
        )
        with self._turn():
            end.put(octets)
            self._push()
        self._wake(end)

    def expect(self, edge: int, array: Any) -> None:
        """Give `array` to be filled by the next message of the edge that has none yet; it is as long as the message."""
        end, octets = (
            self._own(self._incoming, edge, "receiver"),
            self._octets(edge, array, writable=True),
        )
        with self._turn():
            end.expect(octets)
            self._push()
        self._wake(end)

    def wait(self, edge: int) -> None:
        """Return when the oldest expected array of the edge that was not waited for yet is filled.

        All else that is under way goes on meanwhile, so ranks may wait in any order. Raises CommError for a message of
        another length, and where the sender is on this node and has died.
        """
        end = self._own(self._incoming, edge, "receiver")
        with self._turn():
            if not end.arrived and not end.under_way:
                raise CommError(
                    f"edge {edge} ({self.edges[edge]}): nothing is expected; call expect before wait"
                )
        rest = _Rest()
        while not self._took(end):
            self._rest(end, rest)
        self._settle()

    def progress(self) -> None:
        """Move all that is under way on, without waiting."""
        with self._turn():
            self._push()
            for end in self._incoming.values():
                end.move()

    def drain(self) -> None:
        """Return when every array that was sent may change: it is on its way.

        The receivers need not wait for their messages, but must have come to expect them.
        """
        rest = _Rest()
        self.progress()
        while sending := [end for end in self._outgoing.values() if end.under_way]:
            rest.offer_core(*sending)
            self.progress()
        self._settle()

    def free(self) -> None:
        """Send what is left, forget what is still expected, give the memory back. Every rank calls it, once."""
        try:
            self.drain()
        finally:
            if self._thread is not None:
                self._thread.end()
            for end in self._messages:
                if isinstance(end, MessagesIncoming):
                    end.cancel()
            self._outgoing, self._incoming = {}, {}
            self._comm.Free()

    # ---- inside ----

    def _own(self, ends: Mapping[int, AnyEnd], edge: int, role: str) -> AnyEnd:
        if edge not in ends:
            known = (
                f"{edge} ({self.edges[edge]})"
                if 0 <= edge < len(self.edges)
                else f"{edge} of {len(self.edges)}"
            )
            raise CommError(
                f"rank {self.rank} is not the {role} of edge {known}; its own are {list(ends)}"
            )
        return ends[edge]

    def _octets(self, edge: int, array: Any, writable: bool) -> Octets:
        octets = as_buffer(array, writable).octets
        if octets.size > self.edges[edge].nbytes:
            raise CommError(
                f"an array of {octets.size:,} bytes is too long for edge {edge} ({self.edges[edge]})"
            )
        return octets

    def _turn(self) -> AbstractContextManager[None]:
        """Calls of MPI from two threads must not overlap."""
        return nullcontext() if self._thread is None else self._thread.paused()

    def _push(self) -> None:
        for end in self._outgoing.values():
            end.move()

    def _took(self, end: Incoming) -> bool:
        """Move all on; whether `end` had a filled array, which then counts as waited for."""
        with self._turn():
            self._push()
            end.move()
            if end.arrived:
                end.arrived -= 1
                return True
            for other in self._incoming.values():
                if other is not end:
                    other.move()
        return False

    def _rest(self, end: Incoming, rest: "_Rest") -> None:
        """Between two looks. While none of this rank's outboxes holds anything, the mailbox alone is watched."""
        pushes = any(
            isinstance(other, SharedOutgoing) and other.under_way
            for other in self._outgoing.values()
        )
        if isinstance(end, SharedIncoming) and not pushes:
            end.block(SLICE_SECONDS)
            rest.suspect(end)
        else:
            rest.offer_core(end)

    def _wake(self, end: Endpoint) -> None:
        if self._thread is not None and end in self._messages:
            self._thread.resume()

    def _settle(self) -> None:
        """Let the thread sleep where no message is under way."""
        if self._thread is not None and not any(end.under_way for end in self._messages):
            self._thread.pause()


class _Moving:
    """What the thread moves on."""

    def __init__(self, ends: Iterable[Endpoint]) -> None:
        self._ends = ends

    def progress(self) -> None:
        for end in self._ends:
            end.move()


class _Rest:
    """What one does between two looks, the longer the more patiently."""

    def __init__(self) -> None:
        self._began, self._looks = time.monotonic(), 0

    def offer_core(self, *ends: Endpoint) -> None:
        self.suspect(*ends)
        self._looks += 1
        if self._looks % LOOKS_A_NAP == 0 and time.monotonic() - self._began > PATIENCE_SECONDS:
            time.sleep(NAP_SECONDS)
        else:
            os.sched_yield()

    def suspect(self, *ends: Endpoint) -> None:
        """After a while, ask whether `ends` can still get on."""
        if time.monotonic() - self._began > SUSPICION_SECONDS:
            for end in ends:
                end.check()
