"""Simulate a schedule: when each rank computes what, for given costs of actions and messages.

Each rank does its row in order. An action begins when the rank is free and its input has arrived. A
message between two ranks takes `transfer` and overlaps with computation; within a rank it takes no
time.
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.execution_order import execution_order


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit of time, of each stage; B takes the time of I and W together."""

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
        """Make equal costs for each of `stages` stages."""
        return cls(
            (forward,) * stages, (backward_input,) * stages, (backward_weight,) * stages, transfer
        )

    def of(self, action: Action) -> float:
        """Return the time of one action."""
        stage = action.stage
        if action.kind == "F":
            return self.forward[stage]
        weights = self.backward_weight[stage] if action.kind != "I" else 0.0
        return weights + (self.backward_input[stage] if action.kind != "W" else 0.0)


@dataclass(frozen=True)
class Span:
    """An action with its begin and end: simulated, or measured by the executor."""

    action: Action
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`spans[rank]`: the rank's actions with their times, in order."""

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """The time from 0 to the end of the last action."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        return tuple(sum(span.end - span.begin for span in row) for row in self.spans)

    @property
    def bubble(self) -> float:
        """Idle time over computing time: makespan / mean(busy) − 1. GPipe's is (p−1)/m."""
        computing = fmean(self.busy)
        # Actions that cost nothing have no bubble rather than an infinite one.
        return self.makespan / computing - 1 if computing else 0.0

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """The largest number of activations that each rank stores at once.

        The unit is one stage and microbatch, stored from the begin of F to the end of B or W.
        """
        return tuple(_peak(row) for row in self.spans)

    @cached_property
    def halves(self) -> tuple[int, ...]:
        """The largest number of backward passes at once, a rank, between their I and their W."""
        return tuple(_most_halves(row) for row in self.spans)


def _peak(row: tuple[Span, ...]) -> int:
    stored = peak = 0
    for span in row:
        # Counted before the release: during B and W the activations are still needed. I releases
        # nothing, W needs the inputs of the matrix products.
        stored += span.action.kind == "F"
        peak = max(peak, stored)
        stored -= span.action.kind in "BW"
    return peak


def _most_halves(row: tuple[Span, ...]) -> int:
    waiting = most = 0
    for span in row:
        waiting += span.action.kind == "I"
        most = max(most, waiting)
        waiting -= span.action.kind == "W"
    return most


def simulate(schedule: PipelineSchedule, costs: Costs) -> Timeline:
    """Simulate `schedule`, in time linear in its actions. Raises LayoutError for a deadlock."""
    rows: list[list[Span]] = [[] for _ in schedule.rows]
    ends: dict[Action, float] = {}
    # In this order everything that an action needs has its end before the action is reached.
    for rank, action in execution_order(schedule):
        begin = rows[rank][-1].end if rows[rank] else 0.0
        needed = schedule.needs(action)
        if needed is not None:
            away = schedule.rank_of[needed.stage] != rank
            begin = max(begin, ends[needed] + (costs.transfer if away else 0.0))
        ends[action] = begin + costs.of(action)
        rows[rank].append(Span(action, begin, ends[action]))
    return Timeline(tuple(map(tuple, rows)))
