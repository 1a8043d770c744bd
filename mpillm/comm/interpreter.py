"""The one interpreter of collective algorithms: runs a list of steps over mpi4py, in segments.

Segments keep the scratch memory small and in the cache, let a network carry both ways at once, and keep each
message far below the 2³¹ elements that MPI's classic interface can count.

No deadlock: in each step a rank posts its send of segment i before it waits for its receive of segment i or
for its send of segment i − IN_FLIGHT. So whatever a rank waits for is owed by a rank that stands earlier in
its list, and the earliest of all is never kept waiting.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mpillm.comm.algorithms import Step
from mpillm.comm.buffers import Buffer

if TYPE_CHECKING:
    from mpi4py import MPI

# Measured in docs/notes.md: two segments of scratch stay inside a core's cache.
SEGMENT_BYTES = 256 * 1024
IN_FLIGHT = 2
# Any one tag will do: MPI keeps the order of messages between two ranks, and the communicator is the axis's
# own.
TAG = 77

Span = tuple[int, int]


def run(
    steps: Sequence[Step],
    comm: "MPI.Intracomm",
    buffer: Buffer,
    bounds: Sequence[int],
    segment_bytes: int = SEGMENT_BYTES,
) -> None:
    """Run this rank's `steps` on `buffer`, cut into blocks at `bounds` (in elements).

    Every rank of `comm` calls it with its own list of one algorithm, and the same count, element type and
    segments.
    """
    segment = max(1, segment_bytes // buffer.itemsize)
    largest = max((stop - first for first, stop in pairwise(bounds)), default=0)
    adds = any(step.combine == "add" for step in steps)
    scratch = buffer.empty(min(IN_FLIGHT * segment, largest) if adds else 0)
    for step in steps:
        sends = _Sends(step, comm, buffer, cut(bounds, step.send_block, segment))
        receives = _Receives(step, comm, buffer, cut(bounds, step.receive_block, segment), scratch)
        for index in range(max(len(sends.spans), len(receives.spans))):
            sends.post(index)
            receives.finish(index)
        sends.finish()


def cut(bounds: Sequence[int], block: int | None, segment: int) -> list[Span]:
    """Block `block` as spans (first, stop) of at most `segment` elements; none for no block."""
    if block is None:
        return []
    first, stop = bounds[block], bounds[block + 1]
    return [(start, min(start + segment, stop)) for start in range(first, stop, segment)]


class _Sends:
    """The sending half of a step."""

    def __init__(self, step: Step, comm: "MPI.Intracomm", buffer: Buffer, spans: list[Span]) -> None:
        self.spans = spans
        self._comm, self._buffer, self._peer = comm, buffer, step.send_to
        self._requests: deque[MPI.Request] = deque()

    def post(self, index: int) -> None:
        """Start to send segment `index`, if there is one, and wait for the one IN_FLIGHT before it."""
        if index < len(self.spans) and self._peer is not None:
            self._requests.append(self._comm.Isend(self._buffer.raw(*self.spans[index]), self._peer, TAG))
            if len(self._requests) > IN_FLIGHT:
                self._requests.popleft().Wait()

    def finish(self) -> None:
        for request in self._requests:
            request.Wait()


class _Receives:
    """The receiving half: IN_FLIGHT receives stand open, so that no sender waits while this rank adds."""

    def __init__(self, step: Step, comm: "MPI.Intracomm", buffer: Buffer, spans: list[Span], scratch: Buffer) -> None:
        self.spans = spans
        self._segment = spans[0][1] - spans[0][0] if spans else 0  # all but the last are as long
        self._comm, self._buffer, self._scratch = comm, buffer, scratch
        self._adds, self._peer = step.combine == "add", step.receive_from
        self._requests: deque[MPI.Request] = deque()
        for index in range(IN_FLIGHT):
            self._post(index)

    def _place(self, index: int) -> slice:
        """Where in the scratch segment `index` arrives: the segments take turns."""
        first, stop = self.spans[index]
        start = index % IN_FLIGHT * self._segment
        return slice(start, start + stop - first)

    def _post(self, index: int) -> None:
        if index < len(self.spans) and self._peer is not None:
            place = self._place(index)
            memory = self._scratch.raw(place.start, place.stop) if self._adds else self._buffer.raw(*self.spans[index])
            self._requests.append(self._comm.Irecv(memory, self._peer, TAG))

    def finish(self, index: int) -> None:
        """Wait for segment `index`, if there is one, add it, and open the receive IN_FLIGHT after it."""
        if index < len(self.spans):
            self._requests.popleft().Wait()
            if self._adds:
                self._buffer.add(slice(*self.spans[index]), self._scratch, self._place(index))
            self._post(index + IN_FLIGHT)
