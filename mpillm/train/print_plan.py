"""Print the resolved plan of a run before its first step."""

import torch

from mpillm.comm.mesh import Mesh
from mpillm.parallel.step_plan import StepPlan
from mpillm.system.console import Console, binary_bytes
from mpillm.tokens.reader import TokenReader
from mpillm.train.recipe import Recipe

# A weight and its gradient, float32 each; the optimizer's state is added.
WEIGHT_BYTES = 8


def memory_bytes(recipe: Recipe, plan: StepPlan) -> int:
    """Estimate the bytes of training on the rank that needs most, without Python and torch."""
    schedule, model = plan.schedule, recipe.model

    def of_rank(rank: int) -> int:
        parts = [plan.parts[stage] for stage in schedule.stages_of(rank)]
        activations = sum(
            model.activation_bytes(part, plan.microbatch, plan.precision.element_bytes)
            for part in parts
        )
        # A rank stores the activations of `peaks` passes of one of its parts.
        stored = plan.timeline.peaks[rank] / len(parts) * activations
        outputs = model.output_bytes(plan.microbatch) if any(map(model.ends, parts)) else 0
        weights = WEIGHT_BYTES * sum(map(model.parameters_of, parts))
        state = sum(recipe.optimizer.state_bytes(model, part) for part in parts)
        return int(weights + state + stored + outputs)

    return max(map(of_rank, range(schedule.ranks)))


def pipeline_facts(plan: StepPlan) -> dict[str, str]:
    """Return the plan's lines about the pipeline; none without one."""
    schedule = plan.schedule
    if schedule.ranks == 1:
        return {}
    timeline = plan.timeline
    shares = [
        " + ".join(
            str(plan.parts[stage].last - plan.parts[stage].first)
            for stage in schedule.stages_of(rank)
        )
        for rank in range(schedule.ranks)
    ]
    return {
        "pipeline": f"{schedule.name}, {plan.microbatches} microbatches of {plan.microbatch} "
        f"sequences, bubble {timeline.bubble:.1%} with even stages, activations of up to "
        f"{max(timeline.peaks) / schedule.chunks:g} microbatches",
        "layers by rank": ", ".join(shares) + " (embedding with the first, head with the last)",
    }


def print_plan(
    recipe: Recipe,
    mesh: Mesh,
    plan: StepPlan,
    reader: TokenReader,
    console: Console,
    device: str = "cpu",
) -> None:
    """Print the plan; `device`: what to say of it. Every rank calls it."""
    model, train = recipe.model, recipe.train
    step_tokens = train.batch * model.context
    passes = train.steps * step_tokens / reader.n_tokens
    spanned = len(mesh.node_map.nodes)
    console.facts(
        "plan",
        {
            "run": train.run,
            "model": model.describe(),
            "parameters": f"{model.parameters:,}",
            "data": f"{recipe.data.path}: {reader.n_tokens:,} tokens, read {passes:.2f} times",
            "tokens a step": f"{step_tokens:,} = {train.batch} sequences × {model.context}",
            "steps": f"{train.steps:,} ({train.steps * step_tokens:,} tokens)",
            "mesh": f"{mesh.describe()} on {mesh.comm.size} rank(s), {spanned} host(s), "
            f"{torch.get_num_threads()} thread(s) a rank",
            "device": device,
            "a rank's batch": f"{plan.rows} sequences, {plan.microbatch} at once, {train.dtype}"
            + ", sums in a fixed order" * train.fixed_order,
            **pipeline_facts(plan),
            "optimizer": recipe.optimizer.describe(),
            "memory a rank": f"about {binary_bytes(memory_bytes(recipe, plan))}",
        },
    )
