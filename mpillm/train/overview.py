"""The resolved plan: what a run will do, told before it begins."""

from typing import TYPE_CHECKING

import torch

from mpillm.comm.mesh import Mesh, hosts
from mpillm.console import Console, binary_bytes
from mpillm.tokens.reader import TokenReader
from mpillm.train.recipe import Recipe

if TYPE_CHECKING:
    from mpi4py import MPI

# Weights, gradients and AdamW's two averages, float32 each.
STATE_BYTES_PER_PARAMETER = 16


def rows_at_once(recipe: Recipe, data_ranks: int) -> int:
    """Sequences in one microbatch of a rank."""
    rows = recipe.train.batch // data_ranks
    return min(rows, recipe.train.microbatch or rows)


def memory_bytes(recipe: Recipe, data_ranks: int) -> int:
    """What training takes on one rank besides the program itself: an estimate."""
    element = 2 if recipe.train.dtype == "bfloat16" else 4
    state = STATE_BYTES_PER_PARAMETER * recipe.model.parameters
    return state + recipe.model.activation_bytes(rows_at_once(recipe, data_ranks), element)


def tell_plan(recipe: Recipe, mesh: Mesh, reader: TokenReader, comm: "MPI.Intracomm", console: Console) -> None:
    """Print the plan. Every rank calls it."""
    model, train = recipe.model, recipe.train
    step_tokens = train.batch * model.context
    data = mesh.axis("data").size
    passes = train.steps * step_tokens / reader.n_tokens
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
            "mesh": f"{mesh.describe()} on {comm.size} rank(s), {hosts(comm)} host(s), "
            f"{torch.get_num_threads()} thread(s) a rank",
            "a rank's batch": f"{train.batch // data} sequences, {rows_at_once(recipe, data)} at once, {train.dtype}",
            "optimizer": f"AdamW, rate {recipe.optimizer.learning_rate:g}, {recipe.optimizer.schedule}, "
            f"warm-up {recipe.optimizer.warmup_steps} steps, decay {recipe.optimizer.weight_decay:g}",
            "memory a rank": f"about {binary_bytes(memory_bytes(recipe, data))}",
        },
    )
