"""Pipeline schedules as plain data: for each rank, the list of its actions.

p ranks hold S = p · v stages of the model, v of them each; a batch is cut into m microbatches. An
action is one computation of one stage on one microbatch: F forward, B backward. B can be split: I
computes the gradient of the stage's input, which the stage before needs; W computes the gradients
of the weights, which no other stage needs.

This module imports neither torch nor MPI, so the planner and `mpillm schedule` load neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

Kind = Literal["F", "B", "I", "W"]
KINDS: Mapping[str, str] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "backward of the input", "W": "backward of the weights"}
)


@dataclass(frozen=True, order=True)
class Action:
    """One computation; `str` gives its cell in a CSV file: `1B3` is B of stage 1, microbatch 3."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class RoutedAction:
    """An action of one rank, with the channels of its input and of its result.

    Channels are indices into `PipelineSchedule.channels`.
    """

    action: Action
    receive_from: int | None
    """The channel on which another rank's result arrives before the action; None without one."""
    send_to: int | None
    """The channel that takes the result to another rank; None where the result stays or ends."""
    local_input: Action | None
    """The action of another stage on this rank whose result this action takes; None without one."""


@dataclass(frozen=True)
class RoutedRow:
    """The row of one rank, prepared for execution."""

    actions: tuple[RoutedAction, ...]
    arrivals: Mapping[int, tuple[int, ...]]
    """Receiving channel → the microbatches that arrive on it, in order; by first use."""


@dataclass(frozen=True)
class PipelineSchedule:
    """`rows[rank]`: the rank's actions, in order. Stages and microbatches count from 0."""

    name: str
    rows: tuple[tuple[Action, ...], ...]
    stages: int
    microbatches: int

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @cached_property
    def places(self) -> dict[Action, tuple[int, int]]:
        """Action → (rank, index in the rank's row)."""
        return {
            action: (rank, index)
            for rank, row in enumerate(self.rows)
            for index, action in enumerate(row)
        }

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank that holds each stage; −1 for a stage that no row names."""
        holders = {action.stage: rank for rank, row in enumerate(self.rows) for action in row}
        return tuple(holders.get(stage, -1) for stage in range(self.stages))

    def stages_of(self, rank: int) -> list[int]:
        """List the stages that `rank` holds, ascending."""
        return [stage for stage, holder in enumerate(self.rank_of) if holder == rank]

    @cached_property
    def chunk_of(self) -> tuple[int, ...]:
        """The index of each stage among the stages of its rank, from 0."""
        return tuple(self.stages_of(rank).index(stage) for stage, rank in enumerate(self.rank_of))

    @cached_property
    def chunks(self) -> int:
        """The largest number of stages that a rank holds."""
        return max(self.chunk_of) + 1

    @cached_property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """(sending stage, receiving stage) of each channel between two ranks.

        Activations first, then gradients. The list depends on the placement of the stages alone:
        `forward_only` of a schedule has the same channels under the same numbers.
        """
        pairs = [
            (stage, stage + 1)
            for stage in range(self.stages - 1)
            if self.rank_of[stage] != self.rank_of[stage + 1]
        ]
        return (*pairs, *((after, before) for before, after in pairs))

    def routed_row(self, rank: int) -> RoutedRow:
        """Return the row of `rank` with its channels; computed at the first call, then kept."""
        # A rank asks for its own row at every step: the channels are looked up once a schedule, not
        # two or three times an action.
        if rank not in self._routed_rows:
            self._routed_rows[rank] = self._route(rank)
        return self._routed_rows[rank]

    @cached_property
    def _routed_rows(self) -> dict[int, RoutedRow]:
        return {}

    def _route(self, rank: int) -> RoutedRow:
        channel_of = {ends: number for number, ends in enumerate(self.channels)}
        routed: list[RoutedAction] = []
        arrivals: dict[int, list[int]] = {}
        for action in self.rows[rank]:
            needed, receiver = self.needs(action), self.feeds(action)
            receive_from = send_to = local_input = None
            # What the same stage computed before, it keeps itself: no tensor is passed.
            if needed is not None and needed.stage != action.stage:
                receive_from = channel_of.get((needed.stage, action.stage))
                local_input = needed if receive_from is None else None
            if receive_from is not None:
                arrivals.setdefault(receive_from, []).append(action.microbatch)
            if receiver is not None:
                send_to = channel_of.get((action.stage, receiver))
            routed.append(RoutedAction(action, receive_from, send_to, local_input))
        return RoutedRow(
            tuple(routed),
            MappingProxyType({channel: tuple(found) for channel, found in arrivals.items()}),
        )

    def needs(self, action: Action) -> Action | None:
        """Return the action, on any rank, that must end before `action`; None for F of stage 0."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "W":
            return Action(stage, "I", microbatch)
        if action.kind == "F":
            return Action(stage - 1, "F", microbatch) if stage else None
        if stage == self.stages - 1:
            return Action(stage, "F", microbatch)
        # A row may split the backward of one microbatch and not of the next.
        whole = Action(stage + 1, "B", microbatch)
        return whole if whole in self.places else Action(stage + 1, "I", microbatch)

    def feeds(self, action: Action) -> int | None:
        """Return the stage that takes the result of `action`; None where no stage does.

        Activations go to the stage after, gradients of an input to the stage before.
        """
        stage = action.stage + (1 if action.kind == "F" else -1)
        return stage if action.kind != "W" and 0 <= stage < self.stages else None

    def target(self, action: Action) -> int | None:
        """Return the rank that the result of `action` is sent to; None where it is not sent."""
        stage = self.feeds(action)
        if stage is None or self.rank_of[stage] == self.rank_of[action.stage]:
            return None
        return self.rank_of[stage]
