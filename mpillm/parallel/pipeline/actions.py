"""A pipeline's schedule as plain data: for each rank, the list of what it does.

p ranks hold S = p · v stages of the model, v of them each; a batch is cut into m microbatches. An action is one
computation of one stage on one microbatch: F forward, B backward, or B in its two halves: I, the gradient of the
stage's input, which the stage before waits for, and W, the gradients of its weights, for which nobody waits.
No torch and no MPI here: who draws a schedule or plans with it loads neither.
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
    """`str` gives the text of CSV files: `1B3` is the backward of stage 1 on microbatch 3."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


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
        """The stages that `rank` holds, ascending."""
        return [stage for stage, holder in enumerate(self.rank_of) if holder == rank]

    @cached_property
    def chunk_of(self) -> tuple[int, ...]:
        """Which of its rank's stages each stage is, from 0."""
        return tuple(self.stages_of(rank).index(stage) for stage, rank in enumerate(self.rank_of))

    @cached_property
    def chunks(self) -> int:
        """The stages of the rank that holds most."""
        return max(self.chunk_of) + 1

    def needs(self, action: Action) -> Action | None:
        """What must be done before `action`, on whichever rank; None for the forward of stage 0."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "W":
            return Action(stage, "I", microbatch)
        if action.kind == "F":
            return Action(stage - 1, "F", microbatch) if stage else None
        if stage == self.stages - 1:
            return Action(stage, "F", microbatch)
        whole = Action(stage + 1, "B", microbatch)
        return whole if whole in self.places else Action(stage + 1, "I", microbatch)

    def feeds(self, action: Action) -> int | None:
        """The stage that takes the result of `action`: activations go to the next, the gradient of the input to the one
        before; None where nobody takes it.
        """
        stage = action.stage + (1 if action.kind == "F" else -1)
        return stage if action.kind != "W" and 0 <= stage < self.stages else None

    def target(self, action: Action) -> int | None:
        """The rank that the result of `action` is sent to; None where it stays."""
        stage = self.feeds(action)
        if stage is None or self.rank_of[stage] == self.rank_of[action.stage]:
            return None
        return self.rank_of[stage]
