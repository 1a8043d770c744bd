"""Refuse a model that the hosts' memory cannot hold, before torch allocates anything."""

import os

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap
from mpillm.system.console import binary_bytes
from mpillm.train.print_plan import WEIGHT_BYTES
from mpillm.train.recipe import Recipe

# torch's embedding reads ids of 8 bytes.
TOKEN_BYTES = 8


def host_bytes() -> int:
    """Return the memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(recipe: Recipe, node_map: NodeMap, memory: int) -> None:
    """Raise LayoutError where the weights with their state, or a batch, exceed all hosts' memory.

    `memory`: of one host, in bytes. Activations and Python come on top, so a model that passes may
    still be too large; one that is refused cannot be held.
    """
    model = recipe.model
    held = WEIGHT_BYTES + recipe.optimizer.state_bytes_per_parameter
    # The ranks of a pipeline share the layers, each replica has all of them.
    ranks, pipeline = node_map.size, max(1, recipe.parallel.pipeline)
    replicas = max(1, ranks // pipeline)
    needed, there = held * model.parameters * replicas, memory * len(node_map.nodes)
    if needed > there:
        raise LayoutError(
            f"the model has {model.parameters:,} parameters, which need {binary_bytes(needed)} "
            f"for weights, gradients and optimizer on {ranks} rank(s), and the host(s) have "
            f"{binary_bytes(there)}; use a smaller model (vocabulary {model.vocab_size:,}, "
            f"{model.blocks:,} layers), fewer replicas (parallel.pipeline), or more hosts"
        )
    batch = TOKEN_BYTES * recipe.train.batch * model.context
    if batch > there:
        raise LayoutError(
            f"train.batch = {recipe.train.batch:,} sequences of {model.context:,} tokens are "
            f"{binary_bytes(batch)} of ids alone, and the host(s) have {binary_bytes(there)}; "
            "use a smaller batch"
        )
