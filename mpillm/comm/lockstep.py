"""Schedules of whole blocks, round by round: all of a round is posted at once; when it is there, it is combined.

What interpreter.py does for segments, with much less to think about: where each message is a block, or the array is
short, Python's own time is what an algorithm costs beyond its messages.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpillm.comm.buffers import Buffer
from mpillm.comm.interpreter import LARGEST_MESSAGE_BYTES, LEFT_EARLY, Run, Scratch
from mpillm.comm.transfers import Round, Schedule, block_bounds
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.comm.stages import Steps

_Part = tuple[int, int, int]
"""(peer, first element, the element behind its last)."""


def make_steps(
    plan: Schedule, comm: "MPI.Intracomm", source: Buffer, target: Buffer, op: str, segment_bytes: int | None,
    in_flight: int, scratch: Scratch, moved: Callable[[], object] = lambda: None,
) -> "Steps":  # fmt: skip
    """A rank's part in `plan`, ready to begin: in lock step where no message is longer than a segment, else a Run.

    The arguments are those of `Run`.
    """
    longest_bytes = plan.widest * plan.longest(target.count) * target.itemsize
    if longest_bytes <= min(segment_bytes or LARGEST_MESSAGE_BYTES, LARGEST_MESSAGE_BYTES):
        return LockStep(plan, comm, source, target, op, scratch, moved)
    bounds = block_bounds(target.count, plan.blocks)
    return Run(plan.rounds, comm, source, target, bounds, op, segment_bytes, in_flight, scratch, moved)


class LockStep:
    """One rank's part in one collective, with the words of `Run`; another rank's part may be a Run."""

    sent_bytes = 0
    received_bytes = 0

    def __init__(
        self, plan: Schedule, comm: "MPI.Intracomm", source: Buffer, target: Buffer, op: str, scratch: Scratch,
        moved: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        from mpi4py.MPI import Request

        self._receive, self._send = comm.Irecv, comm.Isend
        self._testall, self._waitall = Request.Testall, Request.Waitall
        self._source, self._target, self._op, self._scratch = source, target, op, scratch
        self._moved = moved
        self._bounds = block_bounds(target.count, plan.blocks)
        self._coming = iter(plan.rounds)
        self._made: list[_Messages] = []
        self._added = plan.most_added * plan.longest(target.count)
        self._memory: Buffer | None = None
        self._walk: Iterator[list[MPI.Request]] = iter(())
        self._awaited: list[MPI.Request] | None = None

    def begin(self, tag: int = 0) -> None:
        """As `Run.begin`."""
        if self._awaited is not None:
            raise CommError(LEFT_EARLY)
        self.sent_bytes = self.received_bytes = 0
        self._walk = self._through_rounds(tag)
        self._awaited = next(self._walk, None)

    def progress(self) -> bool:
        """As `Run.progress`."""
        while self._awaited is not None:
            if not self._testall(self._awaited):
                return False
            self._moved()
            self._awaited = next(self._walk, None)
        return True

    def wait(self) -> None:
        """As `Run.wait`."""
        while self._awaited is not None:
            self._waitall(self._awaited)
            self._awaited = next(self._walk, None)

    def _through_rounds(self, tag: int) -> "Iterator[list[MPI.Request]]":
        """Give the messages that must be complete before it goes on.

        What a round sends may still be leaving while the next one goes on. Before a rank has posted all of a round it
        waits for messages of earlier rounds only, so no circle of waiting can form.
        """
        receive, send = self._receive, self._send
        self._borrow()
        leaving: list[MPI.Request] = []
        for messages in self._rounds():
            if messages.overwrites_leaving:
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
                yield leaving
                leaving = []
                arriving = [receive(octets, peer, tag) for octets, peer in messages.arrivals]
            else:  # receives first: what finds one open is not copied twice
                arriving = [receive(octets, peer, tag) for octets, peer in messages.arrivals]
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
            self.sent_bytes += messages.sent_bytes
            self.received_bytes += messages.received_bytes
            if messages.sums_over_sent:
                arriving, sent = arriving + sent, []
            yield arriving + leaving
            leaving = sent
            for combine in messages.sums:
                combine()
        yield leaving
        if self._memory is not None and not self._scratch.give_back(self._memory):
            self._arrive_in(None)

    def _rounds(self) -> "Iterator[_Messages]":
        """Those that carry anything, made when they are first reached."""
        yield from self._made
        for transfers in self._coming:
            messages = _Messages(
                transfers, self._source, self._target, self._bounds, self._made[-1] if self._made else None
            )
            if messages.sends or messages.received_bytes:
                messages.arrive_in(self._memory, self._target, self._op)
                self._made.append(messages)
                yield messages

    def _borrow(self) -> None:
        """Have memory for what is added: that of the last run as a rule, and then its parts are cut out already."""
        memory = self._scratch.borrow(self._target, self._added) if self._added else None
        if memory is not self._memory:
            self._arrive_in(memory)

    def _arrive_in(self, memory: Buffer | None) -> None:
        self._memory = memory
        for messages in self._made:
            messages.arrive_in(memory, self._target, self._op)


class _Messages:
    """What one round sends, receives and sums, each piece of memory cut out once. `before`: the round before, if any.

    `overwrites_leaving`: it receives over what the round before sends. `sums_over_sent`: it sums into what it sends.
    """

    def __init__(
        self, transfers: Round, source: Buffer, target: Buffer, bounds: Sequence[int], before: "_Messages | None"
    ) -> None:
        parts: dict[str, list[_Part]] = {"send": [], "add": [], "copy": []}
        for transfer in transfers:
            first, stop = bounds[transfer.block], bounds[transfer.block + transfer.width]
            if first < stop:
                parts[transfer.action].append((transfer.peer, first, stop))
        self._sent, self._adds, copies = parts["send"], parts["add"], parts["copy"]
        in_place = source is target
        self.overwrites_leaving = in_place and before is not None and _touch(copies, before._sent)
        self.sums_over_sent = in_place and _touch(self._adds, self._sent)
        self.sends = [(source.raw(first, stop), peer) for peer, first, stop in self._sent]
        self._copies = self.arrivals = [(target.raw(first, stop), peer) for peer, first, stop in copies]
        self.sums: list[Callable[[], object]] = []
        added = sum(stop - first for _, first, stop in self._adds)
        self.sent_bytes = sum(octets.size for octets, _ in self.sends)
        self.received_bytes = sum(octets.size for octets, _ in self._copies) + added * target.itemsize

    def arrive_in(self, memory: Buffer | None, target: Buffer, op: str) -> None:
        """What is added comes into `memory` from now on, and is summed from there; None: let go of what there was."""
        self.arrivals, self.sums, end = list(self._copies), [], 0
        if memory is None:
            return
        for peer, first, stop in self._adds:
            begin, end = end, end + stop - first
            self.arrivals.append((memory.raw(begin, end), peer))
            self.sums.append(target.combining(op, slice(first, stop), memory, slice(begin, end)))


def _touch(ones: "Sequence[_Part]", others: "Sequence[_Part]") -> bool:
    """Whether two of them lie in the same memory."""
    return any(first < end and begin < stop for _, first, stop in ones for _, begin, end in others)
