"""Run a schedule in segments over mpi4py, waiting or not: segments flow through the rounds as a
pipeline.

It takes any schedule; where no message is longer than a segment, blockwise.py does the same with
less Python time. An executor is made once for its arrays and started any number of times.

A lane is one direction between this rank and one peer in one round: messages in a fixed order, of
which some are in flight. A segment that was received and combined is sent on while its successor
arrives, so both directions of a link stay busy from the first to the last segment.

No circle of waits can form. A rank opens a round once it has posted all of the round before, and
all rounds before that are complete. Within a round, segment i waits only for segments up to i: a
send for room among those in flight, a sum until the same segment, as it was, has left. So each
message waits only for earlier rounds, or for its own round at no later a segment, on this rank or
another; the earliest waits for nothing. Messages match because both ends post a pair's messages in
one order: by round, then in the lane's order.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, sub
from typing import TYPE_CHECKING, Any

from mpillm.comm.algorithms.schedule import CollectiveSchedule, Transfer, block_bounds, cut
from mpillm.comm.buffers import LARGEST_COUNT, new_scratch
from mpillm.comm.executors.request import Operands
from mpillm.errors import CommError

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI
    from numpy.typing import NDArray

LEFT_EARLY = (
    "a collective was left before its end, so it cannot run again: end the job, or prepare it on "
    "another communicator"
)
# Scratch memory up to this size is kept between runs; longer pieces are rare, and better given
# back.
KEPT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Segmentation:
    """The length of messages, and the number in flight; the same on all ranks of a collective."""

    segment_bytes: int | None = None
    """The longest message; None sends whole blocks."""
    in_flight: int = 2
    """Segments open at once in each lane."""
    added_bytes: int | None = None
    """The longest message that is added on arrival; None: as the others."""


WHOLE_BLOCKS = Segmentation()


class Scratch:
    """Memory for arrivals that are combined, kept from run to run: fresh pages cost as much as the
    messages.
    """

    def __init__(
        self,
        kept_bytes: int = KEPT_BYTES,
        allocate: Callable[[int], Any] = new_scratch,
    ) -> None:
        """`kept_bytes`: the longest piece that is kept; 0 keeps none. `allocate` returns that many
        bytes of new memory: a NumPy array, or a GPU's DeviceBytes.
        """
        self._kept_bytes, self._allocate = kept_bytes, allocate
        self._free: list[NDArray[np.uint8]] = []

    def borrow(self, nbytes: int) -> "NDArray[np.uint8]":
        """Return at least `nbytes` of memory. Pieces too short for this are dropped."""
        while self._free:
            memory = self._free.pop()
            if memory.size >= nbytes:
                return memory
        return self._allocate(nbytes)  # type: ignore[no-any-return]

    def give_back(self, memory: "NDArray[np.uint8]") -> None:
        """Take memory back; a piece that is too long to keep is freed with its last reference."""
        if 0 < memory.size <= self._kept_bytes:
            self._free.append(memory)


class SegmentedExecutor:
    """One rank's part in one collective: a Request that takes a new tag at each start.

    `scratch`: kept by the caller from run to run; without it, memory is fresh each time.
    `next_tag`: gives the same tag on all ranks, different from that of any run still in flight on
    `comm`.

    Every rank of `comm` makes one with its own rounds of one schedule, and the same count, element
    type and segmentation. The buffers are in use from `start` until `test` returns True or `wait`
    returns.
    """

    queued = False
    sent_bytes = 0
    """Of the messages posted since `start`, as `received_bytes`."""
    received_bytes = 0

    def __init__(
        self,
        plan: CollectiveSchedule,
        comm: "MPI.Intracomm",
        operands: Operands,
        segmentation: Segmentation = WHOLE_BLOCKS,
        scratch: Scratch | None = None,
        next_tag: Callable[[], int] = lambda: 0,
    ) -> None:
        from mpi4py.MPI import Request

        self.comm, self.operands, self._next_tag = comm, operands, next_tag
        longest_bytes = min(segmentation.segment_bytes or LARGEST_COUNT, LARGEST_COUNT)
        added_bytes = min(longest_bytes, segmentation.added_bytes or longest_bytes)
        self.longest = max(1, longest_bytes // operands.source.itemsize)
        self.longest_added = max(1, added_bytes // operands.source.itemsize)
        self.in_flight = segmentation.in_flight
        # Of the latest start: lanes read it at each message.
        self.tag = 0
        self._testsome, self._waitsome = Request.Testsome, Request.Waitsome
        self._coming = iter(plan.rounds)
        self.bounds = block_bounds(operands.target.count, plan.blocks)
        self._rounds: list[list[_Lane]] = []
        self._opened = 0
        # Topologically sorted: a lane precedes those that depend on it.
        self._live: list[_Lane] = []
        self.scratch = scratch or Scratch(kept_bytes=0)

    def run(self) -> None:
        """Run the rank's part from beginning to end."""
        self.start()
        self.wait()

    def start(self) -> None:
        """Post the first messages, under the next tag."""
        if self._live:
            raise CommError(LEFT_EARLY)
        self.tag = self._next_tag()
        self.sent_bytes = self.received_bytes = self._opened = 0
        self._open()

    def test(self) -> bool:
        """Progress without waiting; True when this rank's part is complete."""
        while self._live:
            waiting = [lane for lane in self._live if lane.requests]
            arrived = self._testsome([lane.requests[0] for lane in waiting])
            if not arrived:
                return False
            self._completed([waiting[index] for index in arrived])
        return True

    def wait(self) -> None:
        """Block inside MPI until this rank's part is complete."""
        while self._live:
            waiting = [lane for lane in self._live if lane.requests]
            arrived = self._waitsome([lane.requests[0] for lane in waiting])
            assert arrived, (
                "no message is open, yet not all is done: a round overwrites what it sends"
            )
            self._completed([waiting[index] for index in arrived])

    def _completed(self, lanes: "list[_Lane]") -> None:
        """Note the oldest message of each of `lanes` as complete; post and combine all that is now
        possible.
        """
        for lane in lanes:
            lane.requests.popleft()
            lane.complete += 1
        # `_live` is topologically sorted, so one pass suffices.
        for lane in self._live:
            if lane.done < lane.complete or lane.posted < lane.count:
                lane.advance(self)
        self._live = [lane for lane in self._live if lane.done < lane.count]
        self._open()

    def _open(self) -> None:
        """Open rounds while the last one is all posted and those before it are complete."""
        while True:
            for lane in self._live:
                if lane.posted < lane.count or lane.round < self._opened:
                    return
            if self._opened == len(self._rounds) and not self._make_round():
                return
            lanes = self._rounds[self._opened]
            self._opened += 1
            # Receives first: a message that finds its receive open is not copied twice.
            for lane in reversed(lanes):
                lane.open(self)
            self._live += lanes

    def _make_round(self) -> bool:
        """Make the lanes of the next round that carries anything, sends first; False where there is
        none.
        """
        for transfers in self._coming:
            sends: list[_Lane] = []
            arrivals: list[_Lane] = []
            for (action, _), lane_transfers in groupby(transfers, key=_BY_LANE):
                lane = _KINDS[action](self, len(self._rounds) + 1, list(lane_transfers))
                if lane.count:
                    (sends if action == "send" else arrivals).append(lane)
            if sends or arrivals:
                if self.operands.in_place:
                    self._order(sends, arrivals)
                self._rounds.append(sends + arrivals)
                return True
        return False

    def _order(self, sends: "list[_Lane]", arrivals: "list[_Lane]") -> None:
        """Note which lanes of this round, and of the one before, touch the same memory.

        No older round is still live by then.
        """
        before = self._rounds[-1] if self._rounds else []
        for lane in sends:
            lane.after = [
                other for other in before if type(other) is not _SendLane and lane.depends_on(other)
            ]
        for lane in arrivals:
            earlier = before + sends if type(lane) is _AddLane else before
            lane.after = [other for other in earlier if lane.depends_on(other)]


class _Lane:
    """Messages between this rank and one peer, one direction, in one round; each segment is posted,
    then complete, then done.

    `round`: its number, from 1. `after`: a segment of this lane may start only when the overlapping
    segments of these lanes are done.
    """

    # No reference to the executor: a cycle would pin the caller's arrays until the next garbage
    # collection.
    def __init__(
        self, executor: SegmentedExecutor, number: int, transfers: Sequence[Transfer]
    ) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []
        bounds = executor.bounds
        longest = executor.longest_added if transfers[0].added else executor.longest
        for transfer in transfers:
            first, stop = bounds[transfer.block], bounds[transfer.block + transfer.width]
            for piece in cut(first, stop, longest):
                self.starts.append(piece[0])
                self.stops.append(piece[1])
        self.count = len(self.starts)
        # Messages that make up one segment at most are all posted at once.
        total = sum(map(sub, self.stops, self.starts))
        self.slots = self.count if total <= longest else min(executor.in_flight, self.count)
        self.posted = self.complete = self.done = 0
        self.requests: deque[MPI.Request] = deque()
        self.after: list[_Lane] = []
        self.round = number
        self._peer = transfers[0].peer

    def open(self, executor: SegmentedExecutor) -> None:
        """Begin, from the first segment on."""
        self.posted = self.complete = self.done = 0
        self.advance(executor)

    def depends_on(self, other: "_Lane") -> bool:
        """Return whether the two may touch the same memory."""
        return other.starts[0] < self.stops[-1] and self.starts[0] < other.stops[-1]

    def advance(self, executor: SegmentedExecutor) -> None:
        """Post the next segments, as far as there is room and their memory is free."""
        self.done = self.complete
        while (
            self.posted < self.count
            and self.posted - self.done < self.slots
            and self._is_free(self.posted)
        ):
            self._post(executor, self.posted)
            self.posted += 1

    def _is_free(self, index: int) -> bool:
        for other in self.after:
            if other.done == other.count:
                continue
            # The last segment of `other` that begins before this one ends.
            last = bisect_left(other.starts, self.stops[index]) - 1
            if last >= other.done and other.stops[last] > self.starts[index]:
                return False
        return True

    def _post(self, executor: SegmentedExecutor, index: int) -> None:
        raise NotImplementedError

    def _receive(self, executor: SegmentedExecutor, memory: "NDArray[np.uint8]") -> None:
        self.requests.append(executor.comm.Irecv(memory, self._peer, executor.tag))
        executor.received_bytes += memory.size


class _SendLane(_Lane):
    def _post(self, executor: SegmentedExecutor, index: int) -> None:
        memory = executor.operands.source.raw(self.starts[index], self.stops[index])
        self.requests.append(executor.comm.Isend(memory, self._peer, executor.tag))
        executor.sent_bytes += memory.size


class _CopyLane(_Lane):
    def _post(self, executor: SegmentedExecutor, index: int) -> None:
        target = executor.operands.target
        self._receive(executor, target.raw(self.starts[index], self.stops[index]))


class _AddLane(_Lane):
    """Segments arrive in scratch memory, `slots` of them in turn, and are combined from there."""

    _memory: "NDArray[np.uint8]"

    def __init__(
        self, executor: SegmentedExecutor, number: int, transfers: Sequence[Transfer]
    ) -> None:
        super().__init__(executor, number, transfers)
        self._itemsize = executor.operands.target.itemsize
        self._longest_bytes = self._itemsize * max(map(sub, self.stops, self.starts), default=0)

    def open(self, executor: SegmentedExecutor) -> None:
        self._memory = executor.scratch.borrow(self.slots * self._longest_bytes)
        super().open(executor)

    def advance(self, executor: SegmentedExecutor) -> None:
        operands = executor.operands
        while self.done < self.complete and self._is_free(self.done):
            first, stop = self.starts[self.done], self.stops[self.done]
            combine = operands.target.combining(operands.op, first, stop)
            combine(self._memory[self._place(self.done)])
            self.done += 1
            if self.done == self.count:
                executor.scratch.give_back(self._memory)
                del self._memory
        while self.posted < self.count and self.posted - self.done < self.slots:
            self._post(executor, self.posted)
            self.posted += 1

    def _post(self, executor: SegmentedExecutor, index: int) -> None:
        self._receive(executor, self._memory[self._place(index)])

    def _place(self, index: int) -> slice:
        """Return the bytes of scratch memory in which a segment arrives."""
        start = index % self.slots * self._longest_bytes
        return slice(start, start + (self.stops[index] - self.starts[index]) * self._itemsize)


_BY_LANE = attrgetter("action", "peer")
_KINDS: Mapping[str, type[_Lane]] = {"send": _SendLane, "add": _AddLane, "copy": _CopyLane}
