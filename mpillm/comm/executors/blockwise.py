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

import numpy as np

from mpillm.comm.algorithms.schedule import (
    CollectiveSchedule,
    Round,
    block_bounds,
    cut,
    sums_over_sent,
)
from mpillm.comm.buffers import LARGEST_COUNT
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
    from mpi4py import MPI
    from numpy.typing import NDArray

_Part = tuple[int, int, int]
"""(peer, first element, last element + 1)."""
_Sum = tuple[int, slice, Callable[["NDArray[np.uint8]"], object]]
"""(peer, bytes of the scratch memory in which its message arrives, the sum that takes them)."""
# Two pieces: one is summed while the next arrives.
PIECES_IN_FLIGHT = 2
# Of a schedule that adds nothing: allocating takes longer than posting a message.
NO_MEMORY = np.empty(0, np.uint8)


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
        self._scratch_bytes = added * target.itemsize
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
        needed = self._scratch_bytes
        # No attribute holds it: memory that is not kept is freed when the generator ends.
        memory = self._scratch.borrow(needed) if needed else NO_MEMORY
        # Ranks start alike but progress at other times, so the tag is taken here.
        self._walk = self._through_rounds(self._next_tag(), memory)
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

    def _through_rounds(
        self, tag: int, memory: "NDArray[np.uint8]"
    ) -> "Iterator[list[MPI.Request]]":
        """Yield the messages that must be complete before it continues; give `memory` back.

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
            arriving = [receive(octets, peer, tag) for octets, peer in messages.copies]
            pieces = [
                [receive(memory[place], peer, tag) for peer, place, _ in sums]
                for sums in messages.pieces[:PIECES_IN_FLIGHT]
            ]
            if not messages.overwrites_leaving:
                # Receives first: a message that finds its receive open is not copied twice.
                sent = [send(octets, peer, tag) for octets, peer in messages.sends]
            self.sent_bytes += messages.sent_bytes
            self.received_bytes += messages.received_bytes
            if messages.sums_over_sent:
                leaving, sent = leaving + sent, []
            for number, sums in enumerate(messages.pieces, PIECES_IN_FLIGHT):
                yield arriving + pieces.pop(0) + leaving
                arriving, leaving = [], []
                for _, place, combine in sums:
                    combine(memory[place])
                if number < len(messages.pieces):
                    pieces.append(
                        [
                            receive(memory[place], peer, tag)
                            for peer, place, _ in messages.pieces[number]
                        ]
                    )
            leaving = sent
        yield leaving
        self._scratch.give_back(memory)

    def _make_round(self) -> bool:
        """Make the messages of the next round that carries anything; False where there is none."""
        for transfers in self._coming:
            before = self._made[-1] if self._made else None
            messages = _RoundMessages(transfers, self._operands, self._bounds, self._piece, before)
            if messages.sends or messages.received_bytes:
                self._made.append(messages)
                return True
        return False


class _RoundMessages:
    """The sends, receives and sums of one round, each piece of the arrays cut out once.

    `before`: the round before, if any. `piece`: the most elements of a message that is added.
    `copies` arrive with the first of `pieces`, which are the sums taken together, in order.
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
        self._sent, adds, copies = parts["send"], parts["add"], parts["copy"]
        source, target = operands.source, operands.target
        self.overwrites_leaving = (
            operands.in_place and before is not None and _touch(copies, before._sent)
        )
        self.sums_over_sent = operands.in_place and sums_over_sent(transfers)
        self.sends = [(source.raw(first, stop), peer) for peer, first, stop in self._sent]
        self.copies = [(target.raw(first, stop), peer) for peer, first, stop in copies]
        turns = [adds] if self.sums_over_sent else _turns(adds, piece)
        self.pieces = [
            _sums(turn, operands, number % PIECES_IN_FLIGHT * piece)
            for number, turn in enumerate(turns)
        ]
        self.sent_bytes = target.itemsize * _total(self._sent)
        self.received_bytes = target.itemsize * (_total(adds) + _total(copies))


def _sums(parts: Sequence[_Part], operands: Operands, begin: int) -> list[_Sum]:
    """Prepare the sums of parts that arrive next to each other, from element `begin` of the scratch
    memory on.
    """
    target, sums = operands.target, []
    for peer, first, stop in parts:
        end = begin + stop - first
        place = slice(begin * target.itemsize, end * target.itemsize)
        sums.append((peer, place, target.combining(operands.op, first, stop)))
        begin = end
    return sums


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
