"""Collectives of arrays on a GPU through pinned memory of the host, segment by segment.

While the ranks meet over one segment, by any algorithm of the CPU, the next ones come down from the GPU and the one
before goes up again. The sum is taken on the host, where the data passes anyway: a list algorithm that summed on the
GPU would carry every arrival up and every part sum down, 2 (p − 1) times over the bus in place of once each way.

`plan` is plain counting, and `Staged` knows of no CUDA: both are tested without a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from mpillm.comm.algorithms.schedule import block_bounds


@dataclass(frozen=True)
class StagingSpan:
    """`count` elements from `device` on in the array on the GPU, and from `host` on in the segment's memory."""

    device: int
    host: int
    count: int


@dataclass(frozen=True)
class Segment:
    """One host collective, in place, of `count` elements: the same on every rank."""

    count: int
    down: tuple[StagingSpan, ...]
    """What this rank gives to it, from the source."""
    up: tuple[StagingSpan, ...]
    """What this rank takes from it, into the target."""


def plan_staging(
    operation: str, count: int, size: int, rank: int, root: int, most: int, *, in_place: bool
) -> tuple[Segment, ...]:
    """The segments of a collective over a whole array of `count` elements, each of `most` or of `size` at most.

    Where the array is cut in blocks, a segment has the same piece of every block, so that it is such a collective
    itself. Blocks that are an element shorter than others leave a gap in the last one. `in_place`: source and target
    are one array, the whole; else the source of an allgather and the target of a reduce_scatter are the own block.
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
    longest, each = -(-count // size), max(1, most // size)
    return tuple(
        _of_blocks(operation, count, size, rank, first, min(each, longest - first), in_place)
        for first in range(0, longest, each)
    )


def _of_blocks(
    operation: str, count: int, size: int, rank: int, first: int, width: int, in_place: bool
) -> Segment:
    """The segment of elements `first` to `first + width` of each block."""
    every = [
        StagingSpan(start + first, block * width, max(0, min(width, stop - start - first)))
        for block, (start, stop) in enumerate(pairwise(block_bounds(count, size)))
    ]
    own = every[rank] if in_place else StagingSpan(first, rank * width, every[rank].count)
    down = [own] if operation == "allgather" else every
    up = [own] if operation == "reduce_scatter" else every
    if operation == "allgather" and in_place:
        up = every[:rank] + every[rank + 1 :]
    return Segment(size * width, _kept(down), _kept(up))


def _kept(spans: Iterable[StagingSpan]) -> tuple[StagingSpan, ...]:
    return tuple(span for span in spans if span.count)


class Copies(Protocol):
    """Copies between arrays on a GPU and `slots` pieces of pinned memory, both ways at once; copies.py has it."""

    slots: int

    def begin(self) -> None:
        """Let all copies wait for what the caller's stream had been given when it was marked."""

    def down(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        """Begin to fill a slot, behind the last copy up from it."""

    def arrived(self, slot: int) -> bool:
        """Whether the slot is the host's: filled, and copied up before."""

    def await_down(self, slot: int) -> None:
        """Return when it is."""

    def up(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        """Begin to copy from a slot into the result."""

    def finish(self) -> None:
        """Let the caller's stream wait for all copies up."""


class HostHandle(Protocol):
    """A host collective under way."""

    def test(self) -> bool: ...
    def wait(self) -> None: ...


class Host(Protocol):
    """A host collective, ready to run."""

    def start(self) -> HostHandle: ...


class Staged:
    """A stage (stages.py): segment i passes through slot i modulo `slots`, and `hosts[i]` is its collective.

    One host collective is under way at a time, in the order of the segments: the same on every rank. All is done when
    the last one is, and the last copy up is in order with the caller's stream; the host doesn't wait for that.
    """

    def __init__(self, segments: Sequence[Segment], hosts: Sequence[Host], copies: Copies) -> None:
        self._segments, self._hosts, self._copies = segments, hosts, copies
        self._lowered = self._raised = len(segments)
        self._meeting: HostHandle | None = None

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        self._lowered = self._raised = 0
        self._copies.begin()
        self._lower()

    def test(self) -> bool:
        while self._raised < len(self._segments):
            if self._meeting is None:
                if not self._copies.arrived(self._slot(self._raised)):
                    return False
                self._meeting = self._hosts[self._raised].start()
            if not self._meeting.test():
                return False
            self._raise()
        return True

    def wait(self) -> None:
        while self._raised < len(self._segments):
            if self._meeting is None:
                self._copies.await_down(self._slot(self._raised))
                self._meeting = self._hosts[self._raised].start()
            self._meeting.wait()
            self._raise()

    def _slot(self, index: int) -> int:
        return index % self._copies.slots

    def _lower(self) -> None:
        """Begin the copies down for which there is a slot."""
        while (
            self._lowered < len(self._segments)
            and self._lowered - self._raised < self._copies.slots
        ):
            self._copies.down(self._slot(self._lowered), self._segments[self._lowered].down)
            self._lowered += 1

    def _raise(self) -> None:
        """The host collective of a segment is done: copy up, and refill its slot."""
        self._meeting = None
        self._copies.up(self._slot(self._raised), self._segments[self._raised].up)
        self._raised += 1
        self._lower()
        if self._raised == len(self._segments):
            self._copies.finish()
