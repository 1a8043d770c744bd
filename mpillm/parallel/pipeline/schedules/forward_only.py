"""The forwards alone, for evaluation: any number of microbatches on the stages of a schedule."""

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.schedule_rule import split_rounds


def forward_only(schedule: PipelineSchedule, microbatches: int) -> PipelineSchedule:
    """Make the schedule of `microbatches` forwards, with each stage on the rank of `schedule`.

    Each rank takes, of the forwards whose input has arrived, the earliest round of microbatches,
    and of that the earliest stage. All ranks stay busy, and few activations wait at a rank. Raises
    LayoutError for less than 1 microbatch.
    """
    if microbatches < 1:
        raise LayoutError(
            f"a forward pass takes at least 1 microbatch, not {microbatches}; give more"
        )
    sizes = split_rounds(schedule.ranks, microbatches)
    round_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    arrived = [microbatches] + [0] * schedule.stages
    done = [0] * schedule.stages
    held = [schedule.stages_of(rank) for rank in range(schedule.ranks)]
    rows: list[list[Action]] = [[] for _ in schedule.rows]
    # Played in time steps of one forward each. An order that was played has no deadlock.
    while done[-1] < microbatches:
        waiting = [
            [(round_of[done[s]], s) for s in stages if done[s] < arrived[s]] for stages in held
        ]
        # All ranks choose before any result arrives: a forward takes one time step.
        chosen = [(rows[rank], min(ready)[1]) for rank, ready in enumerate(waiting) if ready]
        for row, stage in chosen:
            row.append(Action(stage, "F", done[stage]))
            done[stage] += 1
            arrived[stage + 1] += 1
    return PipelineSchedule(
        f"{schedule.name} forward", tuple(map(tuple, rows)), schedule.stages, microbatches
    )
