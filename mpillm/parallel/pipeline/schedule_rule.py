"""How a schedule is written: a rule that fills one rank's row, and the numbers that it needs.

In each rule, p is the number of ranks, m of microbatches, v of stages (chunks) a rank; r is the
rank. A rule works for every p, m and v that its ScheduleRule allows.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from mpillm.parallel.pipeline.actions import Action, Kind


class ActionRow:
    """A rank's row while a rule fills it. The row counts microbatches, a rule names chunks only.

    The next F of a chunk is that of its next microbatch, as is its next B or I.
    """

    def __init__(self, stages: list[int]) -> None:
        """`stages[chunk]`: the stage of the whole pipeline that each chunk of the rank is."""
        self.actions: list[Action] = []
        self._stages = stages
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self._delayed: deque[Action] = deque()

    def add(self, times: int, *cells: str) -> None:
        """Append `cells`, `times` times; nothing for 0 times or less.

        A cell is a kind and a chunk, such as F0, B1 or I1; or W alone, the weight half of the
        oldest I without one.
        """
        # A tuple times a negative number is empty: rules need no max(0, …) for their phases.
        for cell in cells * times:
            if cell == "W":
                self.actions.append(self._delayed.popleft())
                continue
            kind, stage = cast("Kind", cell[0]), self._stages[int(cell[1:])]
            count = self._forwards if kind == "F" else self._backwards
            self.actions.append(Action(stage, kind, count[stage]))
            # W takes no chunk: whichever I is oldest, its activations have been stored for longest.
            if kind == "I":
                self._delayed.append(Action(stage, "W", count[stage]))
            count[stage] += 1


@dataclass(frozen=True)
class ScheduleRule:
    """A pipeline schedule: how a rank's row is filled, and for which numbers.

    A plug-in is an instance, named `package.module:Name`.
    """

    fill_row: Callable[[ActionRow, int, int, int, int], None]
    """Takes the row, p, m, v and r; appends all actions of rank r."""
    chunks: int = 1
    """Stages a rank: this number only, or with `more_chunks` this number or more."""
    more_chunks: bool = False
    v_shape: bool = False
    """Stage s is on rank s up to p − 1 and from stage p back up on rank 2p − 1 − s (two chunks).
    Without it, stage s is on rank s mod p."""
    microbatches_a_rank: int = 0
    """The schedule takes at least this number of microbatches times p."""

    def stages_of(self, ranks: int, chunks: int, rank: int) -> list[int]:
        """List the stages of `rank`, by chunk."""
        if self.v_shape:
            return [rank, 2 * ranks - 1 - rank]
        return [rank + ranks * chunk for chunk in range(chunks)]


def split_rounds(ranks: int, microbatches: int) -> list[int]:
    """Split microbatches into rounds, as even as possible, each of `ranks` or more.

    A smaller round would leave a rank waiting. One round where there are fewer microbatches.
    """
    # As many rounds as possible: the fewer microbatches a round, the fewer activations are stored.
    count = max(1, microbatches // ranks)
    return [microbatches // count + (number < microbatches % count) for number in range(count)]
