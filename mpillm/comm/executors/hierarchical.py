"""A hierarchical all-reduce over nodes of several ranks, in pieces that overlap.

While one piece is between the nodes, the next is summed within each node, and the one before is
spread there. So neither the network nor the memory waits for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.comm.backoff import Backoff
from mpillm.comm.executors.request import Request
from mpillm.comm.executors.segmented import LEFT_EARLY
from mpillm.errors import CommError


@dataclass(frozen=True)
class HierarchicalPiece:
    """The three steps of one piece of the array."""

    summed: Request
    """Over the ranks of the node."""
    crossed: Request
    """Over the nodes."""
    spread: Request
    """To the ranks of the node."""


class HierarchicalRequest:
    """A request that takes each of `pieces` through its steps, in order. Every rank has equally
    many.

    The node's team needs its collectives in one order on all its ranks: each piece is summed before
    the one ahead of it is spread. A request that was left early, by an error or Ctrl-C, does not
    start again.
    """

    # Its steps on the node's team start after its own start.
    queued = True

    def __init__(self, pieces: Sequence[HierarchicalPiece]) -> None:
        self._back_off = Backoff()
        self._within, self._between = _Track(), _Track()
        for index, piece in enumerate(pieces):
            self._within.add(piece.summed, after=0)
            self._between.add(piece.crossed, after=len(self._within.requests))
            if index:
                self._within.add(pieces[index - 1].spread, after=index)
        self._within.add(pieces[-1].spread, after=len(pieces))

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        if self._within.in_flight or self._between.in_flight:
            raise CommError(LEFT_EARLY)
        self._within.done = self._between.done = 0
        self.test()

    def test(self) -> bool:
        while self._within.advance(self._between.done) or self._between.advance(self._within.done):
            pass
        return not self._within.in_flight

    def wait(self) -> None:
        while not self.test():
            live = [track for track in (self._within, self._between) if track.live]
            # A blocking wait progresses nothing else, so it is taken only where one step is alone.
            if len(live) == 1:
                live[0].requests[live[0].done].wait()
            else:
                self._back_off()


class _Track:
    """Requests that run one after the other, each after a given number of the other track's."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._after: list[int] = []
        self.done = 0
        self.live = False
        """Whether the first request that is not done has started."""

    def add(self, request: Request, after: int) -> None:
        self.requests.append(request)
        self._after.append(after)
        self.done = len(self.requests)

    @property
    def in_flight(self) -> bool:
        """Whether it has started and is not complete."""
        return self.done < len(self.requests)

    def advance(self, others_done: int) -> bool:
        """Progress without waiting; True where a request completed."""
        before = self.done
        while self.done < len(self.requests):
            request = self.requests[self.done]
            if not self.live and self._after[self.done] <= others_done:
                request.start()
                self.live = True
            if not (self.live and request.test()):
                break
            self.live = False
            self.done += 1
        return self.done > before
