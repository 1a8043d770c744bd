"""The two ends of an edge: mailboxes in shared memory, or messages of MPI.

An end that sends has `put`, one that receives `expect`; `move` carries on what is under way, without waiting. Arrays
are seen as bytes (`Buffer.octets`), and an end keeps them until it has done with them.
"""

from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import kernel
from mpillm.comm.executors.mpi_library import pieces
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

Octets: TypeAlias = NDArray[np.uint8]


class Endpoint(Protocol):
    """What both kinds of ends have."""

    @property
    def under_way(self) -> bool:
        """Whether an array is still in use: not sent yet, or not filled."""

    def move(self) -> None: ...
    def check(self) -> None:
        """Raise CommError where the other rank is gone and this end would wait for ever."""


class Outgoing(Endpoint, Protocol):
    def put(self, octets: Octets) -> None: ...


class Incoming(Endpoint, Protocol):
    arrived: int
    """Arrays that are filled, and that no one has waited for."""

    def expect(self, octets: Octets) -> None: ...


class SharedOutgoing:
    """Into a mailbox; what finds no slot free waits in the outbox."""

    def __init__(self, box: kernel.SpscQueue) -> None:
        self._box = box
        self._outbox: deque[Octets] = deque()

    @property
    def under_way(self) -> bool:
        return bool(self._outbox)

    def put(self, octets: Octets) -> None:
        self._outbox.append(octets)
        self.move()

    def move(self) -> None:
        while self._outbox and self._box.try_send(self._outbox[0]):
            self._outbox.popleft()

    def check(self) -> None:
        self._box.check()


class SharedIncoming:
    """Out of a mailbox."""

    def __init__(self, box: kernel.SpscQueue) -> None:
        self._box = box
        self._expected: deque[Octets] = deque()
        self.arrived = 0

    @property
    def under_way(self) -> bool:
        return bool(self._expected)

    def expect(self, octets: Octets) -> None:
        self._expected.append(octets)

    def move(self) -> None:
        while self._expected and self._box.try_receive(self._expected[0]):
            self._filled()

    def block(self, limit_seconds: float) -> None:
        """Until the oldest expected array is filled, or the limit has passed."""
        if self._box.receive(self._expected[0], limit_seconds):
            self._filled()

    def check(self) -> None:
        self._box.check()

    def _filled(self) -> None:
        self._expected.popleft()
        self.arrived += 1


class MessagesOutgoing:
    """By MPI, each edge under a tag of its own."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, tag: int) -> None:
        self._comm, self._peer, self._tag = comm, peer, tag
        self._requests: deque[MPI.Request] = deque()

    @property
    def under_way(self) -> bool:
        return bool(self._requests)

    def put(self, octets: Octets) -> None:
        # A request of mpi4py keeps its array.
        for first, stop in _spans(octets):
            self._requests.append(self._comm.Isend(octets[first:stop], self._peer, self._tag))

    def move(self) -> None:
        while self._requests and self._requests[0].Test():
            self._requests.popleft()

    def check(self) -> None:
        """Over messages a rank's death is the launcher's task."""


class MessagesIncoming:
    """By MPI, receives posted ahead: what arrives then goes straight to its place."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, tag: int) -> None:
        from mpi4py import MPI

        self._comm, self._peer, self._tag = comm, peer, tag
        # (request, bytes, whether it is its array's last)
        self._requests: deque[tuple[MPI.Request, int, bool]] = deque()
        self._status = MPI.Status()
        self._failure: CommError | None = None
        self.arrived = 0

    @property
    def under_way(self) -> bool:
        return bool(self._requests)

    def expect(self, octets: Octets) -> None:
        for first, stop in _spans(octets):
            # Intel MPI is silent about a message that is too long for an empty array.
            place = octets[first:stop] if octets.size else np.empty(1, np.uint8)
            request = self._comm.Irecv(place, self._peer, self._tag)
            self._requests.append((request, stop - first, stop == octets.size))

    def move(self) -> None:
        while self._requests and self._is_done(*self._requests[0][:2]):
            _, _, last = self._requests.popleft()
            self.arrived += last

    def _is_done(self, request: "MPI.Request", nbytes: int) -> bool:
        from mpi4py import MPI

        # The request is gone, and would pass for an empty message.
        if self._failure is not None:
            raise self._failure
        try:
            done = request.Test(self._status)
            sent: int | str = self._status.Get_count(MPI.BYTE) if done else nbytes
        except MPI.Exception as failure:
            if failure.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            done, sent = True, "more"
        if sent != nbytes:
            self._failure = CommError(
                f"rank {self._peer} sent a message of {sent} bytes, the array for it holds {nbytes}; both ends must "
                "agree on lengths"
            )
            raise self._failure
        return done

    def check(self) -> None:
        """As of MessagesOutgoing."""

    def cancel(self) -> None:
        """Give up what has not arrived."""
        for request, _, _ in self._requests:
            if request:  # one that failed is no more
                request.Cancel()
                request.Wait()
        self._requests.clear()


def _spans(octets: Octets) -> list[tuple[int, int]]:
    # An empty array is a message too: the receiver waits for it.
    return pieces(octets.size) or [(0, 0)]
