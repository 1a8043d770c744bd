"""How often a step gathers a weight of ZeRO-3 where ranks share no memory: no torch, no MPI.

It follows `parallel.data.gathered_weights`: a pass walks the blocks of its stage, and a block that
is held is not gathered again.
"""

from mpillm.models.spec import ModelSpec
from mpillm.parallel.step_plan import StepPlan

# Passes that walk the blocks from the first to the last. The others walk them back.
ASCENDING = "FW"


def gathers_a_step(model: ModelSpec, plan: StepPlan) -> float:
    """Count the gathers of a weight in a step, the mean over the weights and ranks.

    Weights outside of blocks are gathered once. A pass begins with the block that the pass before
    it has ended with, or gathers all of its own.
    """
    gathered, held_by_all = 0.0, 0
    for rank, row in enumerate(plan.schedule.rows):
        parts = {stage: plan.parts[stage] for stage in plan.schedule.stages_of(rank)}
        counts = {stage: model.parameters_of(part) for stage, part in parts.items()}
        outside = {stage: model.block_parameters_of(part)[0] for stage, part in parts.items()}
        held_by_all += sum(counts.values())
        gathered += sum(outside.values())
        held: int | None = None
        for action in row:
            part, stage = parts[action.stage], action.stage
            ends = part.first, part.last - 1
            first, last = ends if action.kind in ASCENDING else reversed(ends)
            each = (counts[stage] - outside[stage]) / part.count
            gathered += each * (part.count - (held == first))
            held = last
    return gathered / held_by_all
