"""The resolved plan: what a run will do, told before it begins."""

import torch

from mpillm.comm.mesh import Mesh, hosts
from mpillm.parallel.step_plan import StepPlan
from mpillm.system.console import Console, binary_bytes
from mpillm.tokens.reader import TokenReader
from mpillm.train.recipe import Recipe

# Weights, gradients and AdamW's two averages, float32 each.
STATE_BYTES_PER_PARAMETER = 16


def memory_bytes(recipe: Recipe, layout: StepPlan) -> int:
    """What training takes on the rank that needs most, besides the program itself: an estimate."""
    model, schedule = recipe.model, layout.schedule
    element = 2 if recipe.train.dtype == "bfloat16" else 4
    activations = model.activation_bytes(layout.microbatch, element)
    if schedule.ranks == 1:
        return STATE_BYTES_PER_PARAMETER * model.parameters + activations
    peaks = layout.timeline.peaks
    logits = 2 * 4 * layout.microbatch * model.context * model.vocab_size
    embedding = model.vocab_size * model.width

    def of_rank(rank: int) -> int:
        parts = [layout.parts[stage] for stage in schedule.stages_of(rank)]
        share = sum(part.last - part.first for part in parts) / model.layers
        at_ends = sum(part.first == 0 or part.last == model.layers for part in parts)
        embeddings = embedding * (2 - model.tied)
        parameters = share * (model.parameters - embeddings) + embedding * at_ends
        stored = peaks[rank] / len(parts) * share * (activations - logits)
        ends = any(part.last == model.layers for part in parts)
        return int(STATE_BYTES_PER_PARAMETER * parameters + stored + logits * ends)

    return max(map(of_rank, range(schedule.ranks)))


def pipeline_facts(layout: StepPlan) -> dict[str, str]:
    """What the plan says of a pipeline; nothing where there is none."""
    schedule = layout.schedule
    if schedule.ranks == 1:
        return {}
    timeline = layout.timeline
    shares = [
        " + ".join(
            str(layout.parts[stage].last - layout.parts[stage].first)
            for stage in schedule.stages_of(rank)
        )
        for rank in range(schedule.ranks)
    ]
    return {
        "pipeline": f"{schedule.name}, {layout.microbatches} microbatches of {layout.microbatch} sequences, bubble "
        f"{timeline.bubble:.1%} with even stages, activations of up to {max(timeline.peaks) / schedule.chunks:g} "
        "microbatches",
        "layers by rank": ", ".join(shares) + " (embedding with the first, head with the last)",
    }


def tell_plan(
    recipe: Recipe, mesh: Mesh, layout: StepPlan, reader: TokenReader, console: Console
) -> None:
    """Print the plan. Every rank calls it."""
    model, train = recipe.model, recipe.train
    step_tokens = train.batch * model.context
    passes = train.steps * step_tokens / reader.n_tokens
    spanned = hosts(mesh.comm)
    console.facts(
        "plan",
        {
            "run": train.run,
            "model": f"{model.layers} layers, width {model.width}, {model.heads} heads "
            f"({model.key_value_heads} of keys and values), context {model.context}, vocabulary {model.vocab_size:,}",
            "parameters": f"{model.parameters:,}",
            "data": f"{recipe.data.path}: {reader.n_tokens:,} tokens, read {passes:.2f} times",
            "tokens a step": f"{step_tokens:,} = {train.batch} sequences × {model.context}",
            "steps": f"{train.steps:,} ({train.steps * step_tokens:,} tokens)",
            "mesh": f"{mesh.describe()} on {mesh.comm.size} rank(s), {spanned} host(s), "
            f"{torch.get_num_threads()} thread(s) a rank",
            "a rank's batch": f"{layout.rows} sequences, {layout.microbatch} at once, {train.dtype}"
            + ", sums in a fixed order" * train.fixed_order,
            **pipeline_facts(layout),
            "optimizer": f"AdamW, rate {recipe.optimizer.learning_rate:g}, {recipe.optimizer.schedule}, "
            f"warm-up {recipe.optimizer.warmup_steps} steps, decay {recipe.optimizer.weight_decay:g}",
            "memory a rank": f"about {binary_bytes(memory_bytes(recipe, layout))}",
        },
    )
