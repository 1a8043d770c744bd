"""The interpreter of collective algorithms: runs the rounds of a schedule over mpi4py, waiting or not.

It takes any schedule and segments; where no message is longer than a segment, lockstep.py does the same with less. A
Run is made once for its arrays and begun any number of times: what can be known before is worked out once.

A lane is all that goes one way between this rank and one peer in one round: messages in a fixed order, of which some
are in flight. Segments flow from round to round: one that was received and combined is sent on while its successor
arrives, so both ways of a link stay busy from the first to the last segment.

No circle of waiting can form. A rank opens a round once it has posted all of the round before, and all rounds before
that are complete; within a round, segment i waits only for segments up to i (a send for room among those in flight; a
sum until the same segment, as it was, has left). So whatever a message waits for lies in an earlier round, or in the
same round at no later a segment, on this rank or another; and the earliest of all waits for nothing. Messages match
because both ends post a pair's messages in one order: round by round, and in a round the lane's.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter, sub
from typing import TYPE_CHECKING

from mpillm.comm.algorithms.schedule import Round, Transfer, cut
from mpillm.comm.buffers import Buffer
from mpillm.errors import CommError

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI
    from numpy.typing import NDArray

IN_FLIGHT = 2
# MPI's classic interface counts to 2³¹ − 1; some libraries err near it.
LARGEST_MESSAGE_BYTES = 2**30 - 1
LEFT_EARLY = "a collective was left before its end, so it cannot run again: end the job, or prepare another group"
# What scratch memory is kept between runs; a longer piece is rare, and its room better given back.
KEPT_BYTES = 256 * 1024 * 1024


class Scratch:
    """Memory for what arrives and is combined, kept from run to run: fresh pages cost as much as the messages."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """`kept_bytes`: the longest piece that is kept; 0 keeps none."""
        self._kept_bytes = kept_bytes
        self._free: defaultdict[str, list[Buffer]] = defaultdict(list)

    def borrow(self, like: Buffer, count: int) -> Buffer:
        """At least `count` elements of the type of `like`. Pieces too short for this are let go."""
        free = self._free[like.element]
        while count and free:
            memory = free.pop()
            if memory.count >= count:
                return memory
        return like.empty(count)

    def give_back(self, memory: Buffer) -> bool:
        """Whether it is kept; else the caller had better let go of it, too."""
        kept = 0 < memory.count * memory.itemsize <= self._kept_bytes
        if kept:
            self._free[memory.element].append(memory)
        return kept


class SegmentedExecutor:
    """One rank's part in one collective: `begin` it, then carry it on by `progress` or `wait`; again when it is done.

    `bounds`: of the blocks, in elements, in both buffers. `target`: `source` itself unless the operation is alltoall.
    `op`: "sum", "max" or "min", for arrivals that are added. `segment_bytes`: the longest message; None sends whole
    blocks. `added_bytes`: the longest of those that are added where they arrive; None: as the others. `in_flight`: the
    segments open at once in each lane. `scratch`: kept by the caller from run to run; without it, memory is fresh each
    time. `moved` is called when `progress` finds that messages are complete.

    Every rank of `comm` makes one with its own rounds of one schedule, and the same bounds, element type and segments.
    The buffers are in use from `begin` until `progress` or `wait` tells that all is done.
    """

    sent_bytes = 0
    """Of the messages posted since `begin`, as `received_bytes`."""
    received_bytes = 0

    def __init__(
        self,
        rounds: Sequence[Round],
        comm: "MPI.Intracomm",
        source: Buffer,
        target: Buffer,
        bounds: Sequence[int],
        op: str = "sum",
        segment_bytes: int | None = None,
        in_flight: int = IN_FLIGHT,
        scratch: Scratch | None = None,
        moved: Callable[[], object] = lambda: None,
        added_bytes: int | None = None,
    ) -> None:
        from mpi4py.MPI import Request

        self.comm, self.source, self.target, self.op = comm, source, target, op
        longest_bytes = min(segment_bytes or LARGEST_MESSAGE_BYTES, LARGEST_MESSAGE_BYTES)
        self.longest = max(1, longest_bytes // source.itemsize)
        self.longest_added = max(
            1, min(longest_bytes, added_bytes or longest_bytes) // source.itemsize
        )
        self.in_flight = in_flight
        self.tag = 0
        self._testsome, self._waitsome = Request.Testsome, Request.Waitsome
        self._coming, self.bounds = iter(rounds), bounds
        self._rounds: list[list[_Lane]] = []
        self._opened = 0
        self._live: list[_Lane] = []
        self.scratch = scratch or Scratch(kept_bytes=0)
        self._moved = moved

    def begin(self, tag: int = 0) -> None:
        """Post the first messages. `tag`: the same on all ranks, another than that of any run that is not complete."""
        if self._live:
            raise CommError(LEFT_EARLY)
        self.tag = tag
        self.sent_bytes = self.received_bytes = self._opened = 0
        self._open()

    def progress(self) -> bool:
        """Do all that can be done without waiting; True when this rank's part is complete."""
        while self._live:
            waiting = [lane for lane in self._live if lane.requests]
            arrived = self._testsome([lane.requests[0] for lane in waiting])
            if not arrived:
                return False
            self._moved()
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
        """Note the oldest message of each of `lanes` as complete; post and combine all that may be now.

        What hangs on a lane stands behind it among the live ones, so that going through them once is enough.
        """
        for lane in lanes:
            lane.requests.popleft()
            lane.complete += 1
        for lane in self._live:
            if lane.done < lane.complete or lane.posted < lane.count:
                lane.advance(self)
        self._live = [lane for lane in self._live if lane.done < lane.count]
        self._open()

    def _open(self) -> None:
        """Open the next rounds for as long as the last one is all posted and those before it are complete."""
        while True:
            for lane in self._live:
                if lane.posted < lane.count or lane.round < self._opened:
                    return
            if self._opened == len(self._rounds) and not self._make_round():
                return
            lanes = self._rounds[self._opened]
            self._opened += 1
            for lane in reversed(lanes):  # receives first: what finds one open is not copied twice
                lane.open(self)
            self._live += lanes

    def _make_round(self) -> bool:
        """Make the lanes of the next round that carries anything, sends first; False where there is none."""
        for transfers in self._coming:
            sends: list[_Lane] = []
            arrivals: list[_Lane] = []
            for (action, _), group in groupby(transfers, key=_BY_LANE):
                lane = _KINDS[action](self, len(self._rounds) + 1, list(group))
                if lane.count:
                    (sends if action == "send" else arrivals).append(lane)
            if sends or arrivals:
                if self.source is self.target:
                    self._order(sends, arrivals)
                self._rounds.append(sends + arrivals)
                return True
        return False

    def _order(self, sends: "list[_Lane]", arrivals: "list[_Lane]") -> None:
        """Note what in the round before, and in this one, touches the same memory: no older round is live beside it."""
        before = self._rounds[-1] if self._rounds else []
        for lane in sends:
            lane.after = [
                other for other in before if type(other) is not _Sends and lane.hangs_on(other)
            ]
        for lane in arrivals:
            earlier = before + sends if type(lane) is _Adds else before
            lane.after = [other for other in earlier if lane.hangs_on(other)]


class _Lane:
    """Messages between this rank and one peer, one way, in one round; segment i is posted, complete and done in turn.

    `round`: its number, from 1. `after`: the lanes of which no overlapping segment may be undone when one of this lane
    reads or writes its own. It has no hold of its run: a circle would keep a caller's arrays until Python looks for it.
    """

    def __init__(self, run: SegmentedExecutor, number: int, transfers: Sequence[Transfer]) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []
        longest = run.longest_added if transfers[0].added else run.longest
        for transfer in transfers:
            for start, stop in cut(
                run.bounds[transfer.block], run.bounds[transfer.block + transfer.width], longest
            ):
                self.starts.append(start)
                self.stops.append(stop)
        self.count = len(self.starts)
        # What makes up one segment at most goes all at once.
        total = sum(map(sub, self.stops, self.starts))
        self.slots = self.count if total <= longest else min(run.in_flight, self.count)
        self.posted = self.complete = self.done = 0
        self.requests: deque[MPI.Request] = deque()
        self.after: list[_Lane] = []
        self.round = number
        self._peer = transfers[0].peer

    def open(self, run: SegmentedExecutor) -> None:
        """Begin, from the first segment on."""
        self.posted = self.complete = self.done = 0
        self.advance(run)

    def hangs_on(self, other: "_Lane") -> bool:
        """Whether the two may touch the same memory."""
        return other.starts[0] < self.stops[-1] and self.starts[0] < other.stops[-1]

    def advance(self, run: SegmentedExecutor) -> None:
        """Post the next segments, as far as there is room and their memory is free."""
        self.done = self.complete
        while (
            self.posted < self.count
            and self.posted - self.done < self.slots
            and self._is_free(self.posted)
        ):
            self._post(run, self.posted)
            self.posted += 1

    def _is_free(self, index: int) -> bool:
        for other in self.after:
            if other.done == other.count:
                continue
            last = bisect_left(other.starts, self.stops[index]) - 1
            if last >= other.done and other.stops[last] > self.starts[index]:
                return False
        return True

    def _post(self, run: SegmentedExecutor, index: int) -> None:
        raise NotImplementedError

    def _receive(self, run: SegmentedExecutor, memory: "NDArray[np.uint8]") -> None:
        self.requests.append(run.comm.Irecv(memory, self._peer, run.tag))
        run.received_bytes += memory.size


class _Sends(_Lane):
    def _post(self, run: SegmentedExecutor, index: int) -> None:
        memory = run.source.raw(self.starts[index], self.stops[index])
        self.requests.append(run.comm.Isend(memory, self._peer, run.tag))
        run.sent_bytes += memory.size


class _CopyGroups(_Lane):
    def _post(self, run: SegmentedExecutor, index: int) -> None:
        self._receive(run, run.target.raw(self.starts[index], self.stops[index]))


class _Adds(_Lane):
    """Segments arrive in scratch memory, `slots` of them in turn, and are combined from there."""

    _memory: Buffer

    def __init__(self, run: SegmentedExecutor, number: int, transfers: Sequence[Transfer]) -> None:
        super().__init__(run, number, transfers)
        self._longest = max(map(sub, self.stops, self.starts), default=0)

    def open(self, run: SegmentedExecutor) -> None:
        self._memory = run.scratch.borrow(run.target, self.slots * self._longest)
        super().open(run)

    def advance(self, run: SegmentedExecutor) -> None:
        while self.done < self.complete and self._is_free(self.done):
            own = slice(self.starts[self.done], self.stops[self.done])
            run.target.combine(run.op, own, self._memory, self._place(self.done))
            self.done += 1
            if self.done == self.count:
                run.scratch.give_back(self._memory)
                del self._memory
        while self.posted < self.count and self.posted - self.done < self.slots:
            self._post(run, self.posted)
            self.posted += 1

    def _post(self, run: SegmentedExecutor, index: int) -> None:
        place = self._place(index)
        self._receive(run, self._memory.raw(place.start, place.stop))

    def _place(self, index: int) -> slice:
        start = index % self.slots * self._longest
        return slice(start, start + self.stops[index] - self.starts[index])


_BY_LANE = attrgetter("action", "peer")
_KINDS: Mapping[str, type[_Lane]] = {"send": _Sends, "add": _Adds, "copy": _CopyGroups}
