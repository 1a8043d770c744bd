"""Print the resolved plan of a run before its first step."""

from mpillm.comm.mesh import Mesh
from mpillm.parallel.step_plan import StepPlan
from mpillm.plan.peak_memory import MemoryEstimate
from mpillm.system.console import Console
from mpillm.train.recipe import Recipe


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


def expert_facts(recipe: Recipe) -> dict[str, str]:
    """Return the plan's line about experts that are shared out; none without them."""
    ranks, experts = recipe.parallel.experts, recipe.model.experts
    if ranks == 1:
        return {}
    return {"experts": f"{experts} of a mixture, {experts // ranks} on each of {ranks} ranks"}


def tuning_facts(recipe: Recipe) -> dict[str, str]:
    """Return the plan's line about what is trained; none where all weights are."""
    tuning, adapter, model = recipe.tuning, recipe.adapter, recipe.model
    if not tuning.freezes:
        return {}
    count = f"about {tuning.trained_of(model, model.whole):,} parameters"
    if not adapter.used:
        return {"trained": f"{count}; frozen: {', '.join(tuning.freeze)}"}
    base = "" if adapter.base == "float32" else f", base in {adapter.base}"
    return {"trained": f"{count} by {adapter.method} of rank {adapter.rank}{base}"}


def teacher_facts(recipe: Recipe, plan: StepPlan) -> dict[str, str]:
    """Return the plan's line about the teacher; none without one."""
    if plan.teacher is None:
        return {}
    settings, spec = recipe.distillation, plan.teacher.spec
    hidden = f", {settings.hidden} of {len(plan.teacher.pairs)} layer(s)" * bool(plan.teacher.pairs)
    return {
        "teacher": f"{settings.teacher}: {spec.describe()}, {spec.parameters:,} parameters in "
        f"{plan.teacher.dtype(plan.precision.dtype)}; alpha {settings.alpha:g}, temperature "
        f"{settings.temperature:g}{hidden}"
    }


def print_plan(
    recipe: Recipe,
    mesh: Mesh,
    plan: StepPlan,
    data: str,
    console: Console,
    device: str,
    memory: MemoryEstimate,
) -> None:
    """Print the plan; `data`, `device`: what to say of them. Every rank calls it."""
    # Imported here: `pipeline_facts` serves a dry run, too, where torch may not be installed.
    import torch

    model, train = recipe.model, recipe.train
    step_tokens = train.batch * model.context
    spanned = len(mesh.node_map.nodes)
    console.facts(
        "plan",
        {
            "run": train.run,
            "model": model.describe(),
            "parameters": f"{model.parameters:,}",
            **tuning_facts(recipe),
            **teacher_facts(recipe, plan),
            "data": f"{recipe.data.path}: {data}",
            "tokens a step": f"{step_tokens:,} = {train.batch} sequences × {model.context}",
            "steps": f"{train.steps:,} ({train.steps * step_tokens:,} tokens)",
            "mesh": f"{mesh.describe()} on {mesh.comm.size} rank(s), {spanned} host(s), "
            f"{torch.get_num_threads()} thread(s) a rank",
            "device": device,
            "a rank's batch": f"{plan.rows} sequences, {plan.microbatch} at once, {train.dtype}"
            + ", sums in a fixed order" * train.fixed_order,
            **pipeline_facts(plan),
            **expert_facts(recipe),
            "optimizer": recipe.optimizer.describe(),
            "memory a rank": memory.describe(),
        },
    )
