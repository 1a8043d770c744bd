"""Run a schedule block by block: all messages of a round are posted at once and combined when they
are there.

segmented.py does the same for segments, at more Python time a message. Where each message is a
block, or the array is short, Python's own time is the cost of an algorithm beyond its messages.

Blocks that are added may come in pieces, of which a rank takes two at a time: scratch memory is
then so small that it stays in the processor's cache from the message to the sum. This cannot
deadlock. A rank posts all sends of a round before it waits for any of its pieces. No sum of these
waits for the sends of the same round; where a sum would overwrite them, all pieces are taken at
once.
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
from mpillm.comm.buffers import LARGEST_COUNT, Buffer
from mpillm.comm.executors.request import Operands, Request
from mpillm.comm.executors.segmented import (
    LEFT_EARLY,
    WHOLE_BLOCKS,
    Scratch,
    Segmentation,
    SegmentedExecutor,
)
from mpillm.errors import CommError

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI
    from numpy.typing import NDArray

_Part = tuple[int, int, int]
"""(peer, first element, last element + 1)."""
_Arrivals = list[tuple["NDArray[np.uint8]", int]]
"""The memory that messages arrive in, and their peers."""
# Two pieces: one is summed while the next arrives.
PIECES_IN_FLIGHT = 2


def make_executor(
    plan: CollectiveSchedule,
    comm: "MPI.Intracomm",
    operands: Operands,
    segmentation: Segmentation,
    scratch: Scratch,
    next_tag: Callable[[], int],
) -> Request:
    """Choose the executor of a rank's part in `plan`: blockwise where no message is longer than a
    segment.

    The arguments are those of SegmentedExecutor.
    """
    target = operands.target
    longest_bytes = plan.widest * plan.longest(target.count) * target.itemsize
    blockwise = longest_bytes <= min(segmentation.segment_bytes or LARGEST_COUNT, LARGEST_COUNT)
    executor = BlockwiseExecutor if blockwise else SegmentedExecutor
    return executor(plan, comm, operands, segmentation, scratch, next_tag)


class BlockwiseExecutor:
    """One rank's part in one collective. Another rank's part may be run by a SegmentedExecutor.

    Arguments and methods are those of SegmentedExecutor; `sent_bytes` and `received_bytes` grow as
    a round opens.
    """

    queued = False
    sent_bytes = 0
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

        # Bound once: looking a method up costs as much as a short message on the way.
        self._receive, self._send = comm.Irecv, comm.Isend
        self._testall, self._waitall = Request.Testall, Request.Waitall
        self._operands, self._next_tag = operands, next_tag
        self._scratch = scratch or Scratch(kept_bytes=0)
        target = operands.target
        self._bounds = block_bounds(target.count, plan.blocks)
        self._coming = iter(plan.rounds)
        self._made: list[_RoundMessages] = []
        self._piece = max(1, (segmentation.added_bytes or LARGEST_COUNT) // target.itemsize)
        added = plan.most_added * plan.longest(target.count)
        if added > self._piece:
            added = max(PIECES_IN_FLIGHT * self._piece, added if plan.sums_over_sent else 0)
        self._added = added
        self._memory: Buffer | None = None
        self._walk: Iterator[list[MPI.Request]] = iter(())
        self._awaited: list[MPI.Request] | None = None

    def run(self) -> None:
        """Run the rank's part from beginning to end."""
        self.start()
        self.wait()

    def start(self) -> None:
        """Post the messages of the first round, under the next tag."""
        if self._awaited is not None:
            raise CommError(LEFT_EARLY)
        self.sent_bytes = self.received_bytes = 0
        if self._added:
            memory = self._scratch.borrow(self._operands.target, self._added)
            # As a rule it is the memory of the last run, and then the messages are cut out of it
            # already.
            if memory is not self._memory:
                self._arrive_in(memory)
        self._walk = self._through_rounds(self._next_tag())
        self._awaited = next(self._walk, None)

    def test(self) -> bool:
        """Progress without waiting; True when this rank's part is complete."""
        while self._awaited is not None:
            if not self._testall(self._awaited):
                return False
            self._awaited = next(self._walk, None)
        return True

    def wait(self) -> None:
        """Block inside MPI until this rank's part is complete."""
        while self._awaited is not None:
            self._waitall(self._awaited)
            self._awaited = next(self._walk, None)

    def _through_rounds(self, tag: int) -> "Iterator[list[MPI.Request]]":
        """Yield the messages that must be complete before it continues.

        The sends of a round may still be in flight during the next one. Before a rank has posted
        the sends of a round it waits only for messages of earlier rounds. Then it waits for pieces
        whose sends need nothing of this round. So no circle of waits can form.
        """
        receive, send = self._receive, self._send
        leaving: list[MPI.Request] = []
        index = 0
        while index < len(self._made) or self._make_round():
            messages = self._made[index]
            index += 1
            if messages.overwrites_leaving:
                # A receive must not open over memory that a send of the round before still reads.
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
                yield leaving
                leaving = []
            pieces = [
                [receive(octets, peer, tag) for octets, peer in arrivals]
                for arrivals, _ in messages.pieces[:PIECES_IN_FLIGHT]
            ]
            if not messages.overwrites_leaving:
                # Receives first: a message that finds its receive open is not copied twice.
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
            self.sent_bytes += messages.sent_bytes
            self.received_bytes += messages.received_bytes
            if messages.sums_over_sent:
                leaving, sent = leaving + sent, []
            for number, (_, sums) in enumerate(messages.pieces, PIECES_IN_FLIGHT):
                yield pieces.pop(0) + leaving
                leaving = []
                for combine in sums:
                    combine()
                if number < len(messages.pieces):
                    pieces.append(
                        [receive(octets, peer, tag) for octets, peer in messages.pieces[number][0]]
                    )
            leaving = sent
        yield leaving
        if self._memory is not None and not self._scratch.give_back(self._memory):
            self._arrive_in(None)

    def _make_round(self) -> bool:
        """Make the messages of the next round that carries anything; False where there is none."""
        for transfers in self._coming:
            before = self._made[-1] if self._made else None
            messages = _RoundMessages(transfers, self._operands, self._bounds, self._piece, before)
            if messages.sends or messages.received_bytes:
                messages.arrive_in(self._memory, self._operands)
                self._made.append(messages)
                return True
        return False

    def _arrive_in(self, memory: Buffer | None) -> None:
        self._memory = memory
        for messages in self._made:
            messages.arrive_in(memory, self._operands)


class _RoundMessages:
    """The sends, receives and sums of one round, each piece of memory cut out once.

    `before`: the round before, if any. `piece`: the most elements of a message that is added.
    `pieces`: the arrivals, and the sums after them, in the order in which they are taken.
    `overwrites_leaving`: it receives over the sends of the round before. `sums_over_sent`: it sums
    into its own sends.
    """

    def __init__(
        self,
        transfers: Round,
        operands: Operands,
        bounds: Sequence[int],
        piece: int,
        before: "_RoundMessages | None",
    ) -> None:
        parts: dict[str, list[_Part]] = {"send": [], "add": [], "copy": []}
        for transfer in transfers:
            first, stop = bounds[transfer.block], bounds[transfer.block + transfer.width]
            cuts = cut(first, stop, piece if transfer.added else max(1, stop - first))
            parts[transfer.action] += [(transfer.peer, *ends) for ends in cuts]
        self._piece, copies = piece, parts["copy"]
        self._sent, self._adds = parts["send"], parts["add"]
        source, target = operands.source, operands.target
        self.overwrites_leaving = (
            operands.in_place and before is not None and _touch(copies, before._sent)
        )
        self.sums_over_sent = operands.in_place and sums_over_sent(transfers)
        self.sends = [(source.raw(first, stop), peer) for peer, first, stop in self._sent]
        self._copies = [(target.raw(first, stop), peer) for peer, first, stop in copies]
        self.pieces: list[tuple[_Arrivals, list[Callable[[], object]]]]
        self.sent_bytes = target.itemsize * _total(self._sent)
        self.received_bytes = target.itemsize * (_total(self._adds) + _total(copies))

    def arrive_in(self, memory: Buffer | None, operands: Operands) -> None:
        """Let messages to be added arrive in `memory` from now on; None drops the former one."""
        self.pieces = [(list(self._copies), [])]
        if memory is None:
            return
        turns = [self._adds] if self.sums_over_sent else _turns(self._adds, self._piece)
        for number, turn in enumerate(turns):
            if number:
                self.pieces.append(([], []))
            arrivals, sums = self.pieces[-1]
            end = number % PIECES_IN_FLIGHT * self._piece
            for peer, first, stop in turn:
                begin, end = end, end + stop - first
                arrivals.append((memory.raw(begin, end), peer))
                sums.append(
                    operands.target.combining(
                        operands.op, slice(first, stop), memory, slice(begin, end)
                    )
                )


def _total(parts: Sequence[_Part]) -> int:
    return sum(stop - first for _, first, stop in parts)


def _turns(parts: Sequence[_Part], most: int) -> list[list[_Part]]:
    """Group parts that are taken together, in order: at most `most` elements in all, or a single
    part.
    """
    turns: list[list[_Part]] = [[]]
    for part in parts:
        if turns[-1] and _total([*turns[-1], part]) > most:
            turns.append([])
        turns[-1].append(part)
    return turns


def _touch(ones: "Sequence[_Part]", others: "Sequence[_Part]") -> bool:
    """Return whether two of them share memory."""
    return any(first < end and begin < stop for _, first, stop in ones for _, begin, end in others)
