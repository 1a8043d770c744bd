"""A schedule with its messages, played with sends that block: the tests' second proof.

All computations and messages are put in one order for all ranks, that of a simulation with even
costs. A rank's program is its part of that order. The first event of the order that is not done can
always be done: the ranks that take part in it have nothing to do before it. So the ranks finish
with an MPI library that buffers nothing.
"""

from dataclasses import dataclass
from typing import Literal

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.simulate import Costs, simulate


@dataclass(frozen=True)
class Step:
    """One line of a rank's program. A message has the name of the computation that made it.

    `send 0F3` sends the activations of stage 0 for microbatch 3; `send 1B3` or `send 1I3` sends the
    gradient of the input of stage 1.
    """

    what: Literal["compute", "send", "receive"]
    action: Action
    peer: int = -1
    """The other rank of a message."""

    def __str__(self) -> str:
        toward = {
            "send": f" to rank {self.peer}",
            "receive": f" from rank {self.peer}",
            "compute": "",
        }
        return f"{self.what} {self.action}{toward[self.what]}"


def programs(schedule: PipelineSchedule) -> list[list[Step]]:
    """List for each rank what it computes, sends and receives, in order.

    A send comes right after its computation, the receive at or before its use. The messages of one
    channel are sent and received in the same order. Raises LayoutError for a deadlock.
    """
    # (time, messages before computations, action, ranks that take part). With even costs all
    # computations take time, so sorting puts a message after what made it and before what uses it.
    events: list[tuple[float, int, Action, tuple[int, ...]]] = []
    for rank, row in enumerate(simulate(schedule, Costs.even(schedule.stages)).spans):
        for span in row:
            events.append((span.begin, 1, span.action, (rank,)))
            target = schedule.target(span.action)
            if target is not None:
                events.append((span.end, 0, span.action, (rank, target)))
    steps: list[list[Step]] = [[] for _ in schedule.rows]
    for _, _, action, (rank, *targets) in sorted(events):
        steps[rank].append(Step("send", action, targets[0]) if targets else Step("compute", action))
        for target in targets:
            steps[target].append(Step("receive", action, rank))
    return steps


def run_blocking(programs: list[list[Step]]) -> None:
    """Execute `programs` with sends that return when they are received, and no buffers.

    Raises LayoutError with the cycle when the ranks deadlock; when a computation lacks an input; or
    when a message is not the one that the receiver expects on its channel.
    """
    _Machine(programs).run()


class _Machine:
    """Ranks with blocking messages. `_held[rank]`: what the rank has computed or received."""

    def __init__(self, programs: list[list[Step]]) -> None:
        self._programs = programs
        self._next = [0] * len(programs)
        self._held: list[set[Action]] = [set() for _ in programs]
        self._last_stage = max(
            (step.action.stage for steps in programs for step in steps), default=0
        )

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank in range(len(self._programs)):
                while self._advance(rank):
                    moved = True
        stuck = [rank for rank in range(len(self._programs)) if self._at(rank) is not None]
        if stuck:
            raise LayoutError(f"blocking sends lock: {self._cycle(stuck[0])}")

    def _at(self, rank: int) -> Step | None:
        steps, index = self._programs[rank], self._next[rank]
        return steps[index] if index < len(steps) else None

    def _advance(self, rank: int) -> bool:
        """Do the next step of `rank` if possible; a message is done by its sender."""
        step = self._at(rank)
        if step is None or step.what == "receive":
            return False
        if step.what == "compute":
            self._compute(rank, step.action)
        else:
            if not self._met(rank, step):
                return False
            self._held[step.peer].add(step.action)
            self._next[step.peer] += 1
        self._next[rank] += 1
        return True

    def _compute(self, rank: int, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        inputs = {Action(stage - 1, "F", microbatch)} if action.kind == "F" and stage else set()
        if action.kind != "F":
            inputs = {Action(stage, "I" if action.kind == "W" else "F", microbatch)}
        lacking = inputs - self._held[rank]
        if action.kind in "BI" and stage < self._last_stage:
            gradients = {Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch)}
            lacking |= set() if gradients & self._held[rank] else gradients
        if lacking:
            raise LayoutError(
                f"rank {rank} computes {action} without {' or '.join(map(str, sorted(lacking)))}"
            )
        self._held[rank].add(action)

    def _met(self, rank: int, step: Step) -> bool:
        """Return whether the peer is at the receive of this message's channel."""
        other = self._at(step.peer)
        if other is None or other.what != "receive" or other.peer != rank:
            return False
        if (other.action.stage, other.action.kind == "F") != (
            step.action.stage,
            step.action.kind == "F",
        ):
            return False
        if step.action not in self._held[rank] or other.action != step.action:
            raise LayoutError(f"rank {rank} would {step}, and rank {step.peer} {other}")
        return True

    def _cycle(self, rank: int) -> str:
        chain: list[int] = []
        while rank not in chain and (step := self._at(rank)) is not None:
            chain.append(rank)
            rank = step.peer
        ended = "" if rank in chain else f", and rank {rank} has ended"
        waiting = chain if ended else chain[chain.index(rank) :]
        return ", ".join(f"rank {each} waits to {self._at(each)}" for each in waiting) + ended
