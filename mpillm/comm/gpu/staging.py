"""Collectives of arrays on a GPU through pinned host memory, segment by segment.

While one segment is in a host collective, by any algorithm of the CPU, the next ones are copied
down from the GPU and the one before is copied up again. The sum is taken on the host, as the data
passes there anyway. A list algorithm that sums on the GPU copies every message up and every partial
sum down: 2 (p - 1) times over the bus instead of once each way.

`plan_staging` is pure, and `StagedRequest` uses no CUDA: both are tested without a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from mpillm.comm.algorithms.schedule import block_bounds

if TYPE_CHECKING:
    from mpillm.comm.persistent import PersistentCollective


@dataclass(frozen=True)
class StagingSpan:
    """`count` elements, first at `device` in the array on the GPU and at `host` in the slot."""

    device: int
    host: int
    count: int


@dataclass(frozen=True)
class Segment:
    """One host collective, in place, of `count` elements; `count` is the same on every rank."""

    count: int
    down: tuple[StagingSpan, ...]
    """Spans of this rank's source, copied to the slot before it."""
    up: tuple[StagingSpan, ...]
    """Spans of this rank's target, copied from the slot after it."""


def plan_staging(
    operation: str, count: int, size: int, rank: int, root: int, most: int, *, in_place: bool
) -> tuple[Segment, ...]:
    """Cut a collective over a whole array of `count` elements into segments.

    A segment has at most `most` elements, or `size` if that is more. In an operation on blocks it
    has the same piece of every block, so it is such an operation itself; blocks an element shorter
    than others leave a gap in the last segment. `in_place`: source and target are the whole array.
    Else the source of an allgather and the target of a reduce_scatter are the own block.
    """
    if operation in ("allreduce", "broadcast", "reduce"):
        gives = operation != "broadcast" or rank == root
        takes = operation == "allreduce" or (operation == "reduce") == (rank == root)
        return tuple(
            Segment(
                min(most, count - first),
                _kept([StagingSpan(first, 0, min(most, count - first))] * gives),
                _kept([StagingSpan(first, 0, min(most, count - first))] * takes),
            )
            for first in range(0, count, most)
        )
    # Cut by the longest block, so that every rank has the same number of segments.
    longest, each = -(-count // size), max(1, most // size)
    return tuple(
        _of_blocks(operation, count, size, rank, first, min(each, longest - first), in_place)
        for first in range(0, longest, each)
    )


def _of_blocks(
    operation: str, count: int, size: int, rank: int, first: int, width: int, in_place: bool
) -> Segment:
    """Make the segment of elements `first` to `first + width` of each block."""
    every = [
        StagingSpan(start + first, block * width, max(0, min(width, stop - start - first)))
        for block, (start, stop) in enumerate(pairwise(block_bounds(count, size)))
    ]
    own = every[rank] if in_place else StagingSpan(first, rank * width, every[rank].count)
    down = [own] if operation == "allgather" else every
    up = [own] if operation == "reduce_scatter" else every
    if operation == "allgather" and in_place:
        up = every[:rank] + every[rank + 1 :]  # the own block is in its place already
    return Segment(size * width, _kept(down), _kept(up))


def _kept(spans: Iterable[StagingSpan]) -> tuple[StagingSpan, ...]:
    return tuple(span for span in spans if span.count)


class Copies(Protocol):
    """Copies between arrays on a GPU and `slots` slots of pinned memory, both ways at once.

    pinned.CudaCopies on a GPU; tests have one without CUDA.
    """

    slots: int

    def begin(self) -> None:
        """Let all copies wait for the caller's stream up to its mark."""

    def down(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        """Start to fill a slot, after the last copy up from it."""

    def arrived(self, slot: int) -> bool:
        """Return True when the slot is filled."""

    def await_down(self, slot: int) -> None:
        """Wait until the slot is filled."""

    def up(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        """Start to copy from a slot into the target."""

    def finish(self) -> None:
        """Let the caller's stream wait for all copies up."""


class StagedRequest:
    """Segment i goes through slot i modulo `slots`; `hosts[i]` is its collective on the host.

    One host collective is in flight at a time, in the order of the segments: the same on every
    rank. The request is done when the last one is: the caller's stream waits for the last copy up,
    the host does not.
    """

    queued = False

    def __init__(
        self, segments: Sequence[Segment], hosts: "Sequence[PersistentCollective]", copies: Copies
    ) -> None:
        self._segments, self._hosts, self._copies = segments, hosts, copies
        self._lowered = self._raised = len(segments)
        self._current: PersistentCollective | None = None

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        self._lowered = self._raised = 0
        self._copies.begin()
        self._lower()  # all slots are filled at once, so that copies overlap the first collective

    def test(self) -> bool:
        while self._raised < len(self._segments):
            if self._current is None:
                # In the order of segments on every rank, whenever this rank's slot is filled.
                if not self._copies.arrived(self._slot(self._raised)):
                    return False
                self._current = self._hosts[self._raised].start()
            if not self._current.test():
                return False
            self._raise()
        return True

    def wait(self) -> None:
        while self._raised < len(self._segments):
            if self._current is None:
                self._copies.await_down(self._slot(self._raised))
                self._current = self._hosts[self._raised].start()
            self._current.wait()
            self._raise()

    def _slot(self, index: int) -> int:
        return index % self._copies.slots

    def _lower(self) -> None:
        """Start the copies down for which there is a free slot."""
        while (
            self._lowered < len(self._segments)
            and self._lowered - self._raised < self._copies.slots
        ):
            self._copies.down(self._slot(self._lowered), self._segments[self._lowered].down)
            self._lowered += 1

    def _raise(self) -> None:
        """Copy up a segment whose host collective is done, and refill its slot."""
        self._current = None
        self._copies.up(self._slot(self._raised), self._segments[self._raised].up)
        self._raised += 1
        self._lower()
        if self._raised == len(self._segments):
            self._copies.finish()
