"""An all-reduce over nodes of several ranks, in pieces: while one piece is between the nodes, the next is summed within
each node and the one before is spread there, so that neither the network nor the memory stands idle for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.comm.executors.request import Request
from mpillm.comm.executors.segmented import LEFT_EARLY
from mpillm.comm.waiting import Backoff
from mpillm.errors import CommError


@dataclass(frozen=True)
class HierarchicalPiece:
    """What happens to one piece of the array, one after the other."""

    summed: Request
    """Over the ranks of the node."""
    crossed: Request
    """Summed over the nodes."""
    spread: Request
    """To the ranks of the node."""


class HierarchicalRequest:
    """A stage (stages.py): each of `pieces` in order. Every rank has equally many.

    What the ranks of a node do together must begin in one order on all of them: each piece is summed before the one
    ahead of it is spread. One that was left early, by an error or Ctrl-C, does not start again.
    """

    def __init__(self, pieces: Sequence[HierarchicalPiece]) -> None:
        self._rest = Backoff()
        self._within, self._between = _Track(), _Track()
        for index, piece in enumerate(pieces):
            self._within.add(piece.summed, behind=0)
            self._between.add(piece.crossed, behind=len(self._within.stages))
            if index:
                self._within.add(pieces[index - 1].spread, behind=index)
        self._within.add(pieces[-1].spread, behind=len(pieces))

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        if self._within.under_way or self._between.under_way:
            raise CommError(LEFT_EARLY)
        self._within.done = self._between.done = 0
        self.test()

    def test(self) -> bool:
        while self._within.advance(self._between.done) or self._between.advance(self._within.done):
            pass
        return not self._within.under_way

    def wait(self) -> None:
        while not self.test():
            live = [track for track in (self._within, self._between) if track.live]
            if len(live) == 1:
                live[0].stages[live[0].done].wait()
            else:
                self._rest()


class _Track:
    """Stages that run one after the other, each behind so many of the other track's."""

    def __init__(self) -> None:
        self.stages: list[Request] = []
        self._behind: list[int] = []
        self.done = 0
        self.live = False
        """Whether the stage behind those that are done has begun."""

    def add(self, stage: Request, behind: int) -> None:
        self.stages.append(stage)
        self._behind.append(behind)
        self.done = len(self.stages)

    @property
    def under_way(self) -> bool:
        """Whether it has begun and is not at its end."""
        return self.done < len(self.stages)

    def advance(self, others_done: int) -> bool:
        """Go as far as that is possible without waiting; whether a stage ended."""
        before = self.done
        while self.done < len(self.stages):
            stage = self.stages[self.done]
            if not self.live and self._behind[self.done] <= others_done:
                stage.start()
                self.live = True
            if not (self.live and stage.test()):
                break
            self.live = False
            self.done += 1
        return self.done > before
