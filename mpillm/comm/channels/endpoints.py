"""The endpoints of a channel: SPSC queues in shared memory, or MPI messages.

A sender has `send`, a receiver `post`; `progress` advances what is in flight without waiting.
Arrays are seen as bytes (`octets_of`). An endpoint references an array until its message has left,
or has filled it.
"""

import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpillm.comm import kernel
from mpillm.comm.buffers import ELEMENTS, as_buffer, element_of, message_spans
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

Octets: TypeAlias = NDArray[np.uint8]


def octets_of(array: Any, writable: bool) -> Octets:
    """View a C-contiguous NumPy array or torch CPU tensor as bytes, without a copy.

    It runs once a message, so it takes one call where `as_buffer` takes six. Raises CommError as
    `as_buffer` does, for an array with gaps, on a GPU, of another element type, or read-only.
    """
    torch = sys.modules.get("torch")  # a caller with a tensor has loaded torch; comm never does
    if torch is not None and isinstance(array, torch.Tensor):
        if (
            array.device.type == "cpu"
            and array.is_contiguous()
            and element_of(array.dtype) in ELEMENTS
        ):
            # Bytes, because NumPy has no bfloat16.
            octets: Octets = array.detach().view(-1).view(torch.uint8).numpy()
            return octets
    elif (
        isinstance(array, np.ndarray)
        and array.flags.c_contiguous
        and array.dtype.isnative
        and (array.flags.writeable or not writable)
        and element_of(array.dtype) in ELEMENTS
    ):
        return array.reshape(-1).view(np.uint8)
    # Buffers pass; all else is refused, with the reason.
    return as_buffer(array, writable).octets


class Endpoint(Protocol):
    """A rank's end of one channel."""

    in_flight: deque[Any]
    """Arrays in use, oldest first: not sent yet, or not filled yet."""

    def progress(self) -> None: ...
    def check(self) -> None:
        """Raise CommError where the peer has ended and this endpoint would wait without end."""


class Sender(Endpoint, Protocol):
    """A sending endpoint."""

    def send(self, octets: Octets) -> None: ...


class Receiver(Endpoint, Protocol):
    """A receiving endpoint."""

    filled: int
    """Arrays that are filled and were not waited for."""

    def post(self, octets: Octets) -> None: ...


class SharedSender:
    """The sender of a queue; arrays that find no free slot wait in `in_flight`, the send queue."""

    def __init__(self, queue: kernel.SpscQueue) -> None:
        self._queue = queue
        self.in_flight: deque[Octets] = deque()

    def send(self, octets: Octets) -> None:
        # Straight into a slot, unless earlier messages still wait for one: order is kept.
        if self.in_flight or not self._queue.try_send(octets):
            self.in_flight.append(octets)

    def progress(self) -> None:
        while self.in_flight and self._queue.try_send(self.in_flight[0]):
            self.in_flight.popleft()

    def check(self) -> None:
        self._queue.check()


class SharedReceiver:
    """The receiver of a queue."""

    def __init__(self, queue: kernel.SpscQueue) -> None:
        self._queue = queue
        self.in_flight: deque[Octets] = deque()
        self.filled = 0

    def post(self, octets: Octets) -> None:
        self.in_flight.append(octets)

    def progress(self) -> None:
        while self.in_flight and self._queue.try_receive(self.in_flight[0]):
            self.in_flight.popleft()
            self.filled += 1

    def block(self, limit_seconds: float) -> None:
        """Wait in the kernel, without the GIL, until the oldest array is filled or time is up."""
        if self._queue.receive(self.in_flight[0], limit_seconds):
            self.in_flight.popleft()
            self.filled += 1

    def check(self) -> None:
        self._queue.check()


class MessageSender:
    """The sender of MPI messages; the tag is the channel's number."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, tag: int) -> None:
        self._comm, self._peer, self._tag = comm, peer, tag
        self.in_flight: deque[MPI.Request] = deque()

    def send(self, octets: Octets) -> None:
        # A request of mpi4py keeps its array alive.
        for first, stop in message_spans(octets.size):
            self.in_flight.append(self._comm.Isend(octets[first:stop], self._peer, self._tag))

    def progress(self) -> None:
        while self.in_flight and self.in_flight[0].Test():
            self.in_flight.popleft()

    def check(self) -> None:
        """Do nothing: with MPI messages a dead rank is the launcher's to report."""


class MessageReceiver:
    """The receiver of MPI messages, posted ahead: they arrive in their arrays without a copy."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, tag: int) -> None:
        from mpi4py import MPI

        self._comm, self._peer, self._tag = comm, peer, tag
        # (request, bytes, whether it is its array's last)
        self.in_flight: deque[tuple[MPI.Request, int, bool]] = deque()
        self._status = MPI.Status()
        self._failure: CommError | None = None
        self.filled = 0

    def post(self, octets: Octets) -> None:
        for first, stop in message_spans(octets.size):
            # Intel MPI reports no error for a message too long for an empty array: give it a byte.
            place = octets[first:stop] if octets.size else np.empty(1, np.uint8)
            request = self._comm.Irecv(place, self._peer, self._tag)
            self.in_flight.append((request, stop - first, stop == octets.size))

    def progress(self) -> None:
        while self.in_flight and self._is_done(*self.in_flight[0][:2]):
            _, _, last = self.in_flight.popleft()
            self.filled += last

    def _is_done(self, request: "MPI.Request", nbytes: int) -> bool:
        from mpi4py import MPI

        # The failed request is null now, and its Test would report an empty message.
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
                f"rank {self._peer} sent a message of {sent} bytes, the array for it holds "
                f"{nbytes}; both ends must agree on lengths"
            )
            raise self._failure
        return done

    def check(self) -> None:
        """Do nothing, as in MessageSender."""

    def cancel(self) -> None:
        """Cancel the receives that are still posted."""
        for request, _, _ in self.in_flight:
            if request:  # null after a failure
                request.Cancel()
                request.Wait()
        self.in_flight.clear()
