"""When does each rank do what, if computations and messages take so and so long?

Each rank does its row in order; an action begins when the rank is free and what it needs is there. A message takes
`transfer` between two ranks and nothing within one, and never keeps a rank from computing.
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.order import execution_order


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit of time, for each stage; a whole backward takes both its halves together."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    transfer: float = 0.0
    """Of one message between two ranks."""

    @classmethod
    def even(
        cls,
        stages: int,
        forward: float = 1,
        backward_input: float = 1,
        backward_weight: float = 1,
        transfer: float = 0,
    ) -> "Costs":
        """The same for each of `stages` stages."""
        return cls(
            (forward,) * stages, (backward_input,) * stages, (backward_weight,) * stages, transfer
        )

    def of(self, action: Action) -> float:
        stage = action.stage
        if action.kind == "F":
            return self.forward[stage]
        weights = self.backward_weight[stage] if action.kind != "I" else 0.0
        return weights + (self.backward_input[stage] if action.kind != "W" else 0.0)


@dataclass(frozen=True)
class Span:
    action: Action
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`spans[rank]`: what the rank does when, in order."""

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """From 0 to the end of the last action."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        return tuple(sum(span.end - span.begin for span in row) for row in self.spans)

    @property
    def bubble(self) -> float:
        """Waiting over computing: makespan / mean(busy) − 1. GPipe's is (p−1)/m."""
        computing = fmean(self.busy)
        return self.makespan / computing - 1 if computing else 0.0

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """The most activations that each rank stores at once: of one stage and microbatch each, from the beginning of
        F to the end of B or W.
        """
        return tuple(_peak(row) for row in self.spans)


def _peak(row: tuple[Span, ...]) -> int:
    stored = peak = 0
    for span in row:
        stored += span.action.kind == "F"
        peak = max(peak, stored)
        stored -= span.action.kind in "BW"
    return peak


def simulate(schedule: PipelineSchedule, costs: Costs) -> Timeline:
    """Play `schedule`, in time proportional to its number of actions. Raises LayoutError for a deadlock."""
    rows: list[list[Span]] = [[] for _ in schedule.rows]
    ends: dict[Action, float] = {}
    for rank, action in execution_order(schedule):
        begin = rows[rank][-1].end if rows[rank] else 0.0
        needed = schedule.needs(action)
        if needed is not None:
            away = schedule.rank_of[needed.stage] != rank
            begin = max(begin, ends[needed] + (costs.transfer if away else 0.0))
        ends[action] = begin + costs.of(action)
        rows[rank].append(Span(action, begin, ends[action]))
    return Timeline(tuple(map(tuple, rows)))
