"""Schedules of whole blocks, round by round: all of a round is posted at once; when it is there, it is combined.

What interpreter.py does for segments, with much less to think about: where each message is a block, or the array is
short, Python's own time is what an algorithm costs beyond its messages.

Blocks that are added where they arrive may come in pieces, of which a rank takes two at a time: scratch memory is then
so small that it stays in the processor's cache from the message to the sum. No circle of waiting can form: what a
round sends is posted before the rank waits for any of its pieces, and no sum of these waits for what the same round
sends (where one would overwrite it, all pieces are taken at once).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpillm.comm.algorithms.schedule import (
    CollectiveSchedule,
    Round,
    block_bounds,
    cut,
    sums_over_sent,
)
from mpillm.comm.buffers import Buffer
from mpillm.comm.executors.segmented import (
    LARGEST_MESSAGE_BYTES,
    LEFT_EARLY,
    Scratch,
    SegmentedExecutor,
)
from mpillm.errors import CommError

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI
    from numpy.typing import NDArray

    from mpillm.comm.executors.request import Executor

_Part = tuple[int, int, int]
"""(peer, first element, the element behind its last)."""
_Arrivals = list[tuple["NDArray[np.uint8]", int]]
"""Where messages go, and from which peers they come."""
# Pieces under way at a time: one is summed while the next arrives.
IN_HAND = 2


def make_steps(
    plan: CollectiveSchedule,
    comm: "MPI.Intracomm",
    source: Buffer,
    target: Buffer,
    op: str,
    segment_bytes: int | None,
    in_flight: int,
    scratch: Scratch,
    moved: Callable[[], object] = lambda: None,
    added_bytes: int | None = None,
) -> "Executor":
    """A rank's part in `plan`, ready to begin: in lock step where no message is longer than a segment, else a Run.

    The arguments are those of `Run`.
    """
    longest_bytes = plan.widest * plan.longest(target.count) * target.itemsize
    if longest_bytes <= min(segment_bytes or LARGEST_MESSAGE_BYTES, LARGEST_MESSAGE_BYTES):
        return BlockwiseExecutor(plan, comm, source, target, op, scratch, moved, added_bytes)
    bounds = block_bounds(target.count, plan.blocks)
    return SegmentedExecutor(
        plan.rounds,
        comm,
        source,
        target,
        bounds,
        op,
        segment_bytes,
        in_flight,
        scratch,
        moved,
        added_bytes,
    )


class BlockwiseExecutor:
    """One rank's part in one collective, with the words of `Run`; another rank's part may be a Run.

    `sent_bytes` and `received_bytes` grow as a round opens.
    """

    sent_bytes = 0
    received_bytes = 0

    def __init__(
        self,
        plan: CollectiveSchedule,
        comm: "MPI.Intracomm",
        source: Buffer,
        target: Buffer,
        op: str,
        scratch: Scratch,
        moved: Callable[[], object] = lambda: None,
        added_bytes: int | None = None,
    ) -> None:
        from mpi4py.MPI import Request

        self._receive, self._send = comm.Irecv, comm.Isend
        self._testall, self._waitall = Request.Testall, Request.Waitall
        self._source, self._target, self._op, self._scratch = source, target, op, scratch
        self._moved = moved
        self._bounds = block_bounds(target.count, plan.blocks)
        self._coming = iter(plan.rounds)
        self._made: list[_RoundMessages] = []
        self._piece = max(1, (added_bytes or LARGEST_MESSAGE_BYTES) // target.itemsize)
        added = plan.most_added * plan.longest(target.count)
        if added > self._piece:
            added = max(IN_HAND * self._piece, added if plan.sums_over_sent else 0)
        self._added = added
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

        What a round sends may still be leaving while the next one goes on. Before a rank has posted what a round sends
        it waits for messages of earlier rounds only, and then for pieces whose sends need nothing of this round: so no
        circle of waiting can form.
        """
        receive, send = self._receive, self._send
        self._borrow()
        leaving: list[MPI.Request] = []
        for messages in self._rounds():
            if messages.overwrites_leaving:
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
                yield leaving
                leaving = []
            pieces = [
                [receive(octets, peer, tag) for octets, peer in arrivals]
                for arrivals, _ in messages.pieces[:IN_HAND]
            ]
            if (
                not messages.overwrites_leaving
            ):  # receives first: what finds one open is not copied twice
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
            self.sent_bytes += messages.sent_bytes
            self.received_bytes += messages.received_bytes
            if messages.sums_over_sent:
                leaving, sent = leaving + sent, []
            for index, (_, sums) in enumerate(messages.pieces, IN_HAND):
                yield pieces.pop(0) + leaving
                leaving = []
                for combine in sums:
                    combine()
                if index < len(messages.pieces):
                    pieces.append(
                        [receive(octets, peer, tag) for octets, peer in messages.pieces[index][0]]
                    )
            leaving = sent
        yield leaving
        if self._memory is not None and not self._scratch.give_back(self._memory):
            self._arrive_in(None)

    def _rounds(self) -> "Iterator[_RoundMessages]":
        """Those that carry anything, made when they are first reached."""
        yield from self._made
        for transfers in self._coming:
            messages = _RoundMessages(
                transfers,
                self._source,
                self._target,
                self._bounds,
                self._piece,
                self._made[-1] if self._made else None,
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


class _RoundMessages:
    """What one round sends, receives and sums, each piece of memory cut out once. `before`: the round before, if any.

    `piece`: the most elements of a message that is added. `pieces`: what arrives, and the sums behind it, in the order
    in which it is taken. `overwrites_leaving`: it receives over what the round before sends. `sums_over_sent`: it sums
    into what it sends.
    """

    def __init__(
        self,
        transfers: Round,
        source: Buffer,
        target: Buffer,
        bounds: Sequence[int],
        piece: int,
        before: "_RoundMessages | None",
    ) -> None:
        parts: dict[str, list[_Part]] = {"send": [], "add": [], "copy": []}
        for transfer in transfers:
            first, stop = bounds[transfer.block], bounds[transfer.block + transfer.width]
            cuts = cut(first, stop, piece if transfer.added else max(1, stop - first))
            parts[transfer.action] += [(transfer.peer, *ends) for ends in cuts]
        self._piece, self._sent, self._adds, copies = (
            piece,
            parts["send"],
            parts["add"],
            parts["copy"],
        )
        in_place = source is target
        self.overwrites_leaving = in_place and before is not None and _touch(copies, before._sent)
        self.sums_over_sent = in_place and sums_over_sent(transfers)
        self.sends = [(source.raw(first, stop), peer) for peer, first, stop in self._sent]
        self._copies = [(target.raw(first, stop), peer) for peer, first, stop in copies]
        self.pieces: list[tuple[_Arrivals, list[Callable[[], object]]]]
        self.sent_bytes = target.itemsize * _total(self._sent)
        self.received_bytes = target.itemsize * (_total(self._adds) + _total(copies))

    def arrive_in(self, memory: Buffer | None, target: Buffer, op: str) -> None:
        """What is added comes into `memory` from now on, and is summed from there; None: let go of what there was."""
        self.pieces = [(list(self._copies), [])]
        if memory is None:
            return
        turns = [self._adds] if self.sums_over_sent else _turns(self._adds, self._piece)
        for number, turn in enumerate(turns):
            if number:
                self.pieces.append(([], []))
            arrivals, sums = self.pieces[-1]
            end = number % IN_HAND * self._piece
            for peer, first, stop in turn:
                begin, end = end, end + stop - first
                arrivals.append((memory.raw(begin, end), peer))
                sums.append(target.combining(op, slice(first, stop), memory, slice(begin, end)))


def _total(parts: Sequence[_Part]) -> int:
    return sum(stop - first for _, first, stop in parts)


def _turns(parts: Sequence[_Part], most: int) -> list[list[_Part]]:
    """Those that are taken together, in order: of `most` elements in all, or a single one."""
    turns: list[list[_Part]] = [[]]
    for part in parts:
        if turns[-1] and _total([*turns[-1], part]) > most:
            turns.append([])
        turns[-1].append(part)
    return turns


def _touch(ones: "Sequence[_Part]", others: "Sequence[_Part]") -> bool:
    """Whether two of them lie in the same memory."""
    return any(first < end and begin < stop for _, first, stop in ones for _, begin, end in others)
