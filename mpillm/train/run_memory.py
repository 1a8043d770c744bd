"""The memory of a run: predicted before it, measured after it, and what lets a rank need less."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpillm.errors import LayoutError
from mpillm.machine.memory import peak_resident_bytes, resident_bytes
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.step_plan import StepPlan
from mpillm.plan.held_memory import FLOAT32_BYTES, Replicas
from mpillm.plan.peak_memory import (
    TOKEN_BYTES,
    MemoryEstimate,
    predict_peak,
    rows_at_once,
)
from mpillm.plan.rank_loads import replicas_of
from mpillm.system.console import binary_bytes
from mpillm.train.recipe import Recipe

if TYPE_CHECKING:
    from mpillm.comm.mesh import Mesh


@dataclass(frozen=True)
class RunMemory:
    """Predict and measure the peak of a run's ranks."""

    recipe: Recipe
    replicas: Replicas
    process_bytes: int
    """The largest resident set of a rank before its model is built."""

    @classmethod
    def of(cls, recipe: Recipe, mesh: "Mesh") -> "RunMemory":
        """Measure what the processes take so far. Every rank calls it, before a model is built."""
        replicas = replicas_of(mesh.comm.rank, mesh.sizes, mesh.node_map, recipe.parallel)
        return cls(recipe, replicas, max(mesh.comm.allgather(resident_bytes())))

    def predict(self, plan: StepPlan) -> MemoryEstimate:
        """Estimate the peak of the rank that needs most, with the settings of `plan`."""
        model = self.recipe.model
        return predict_peak(
            model,
            plan,
            self.recipe.optimizer,
            self.replicas,
            self.process_bytes,
            rows_at_once(model),
        )

    def remedy(self, plan: StepPlan) -> str:
        """Say which settings let a rank need less memory, and how much less."""
        now = self.predict(plan).total
        words = [f"{binary_bytes(now)} a rank are predicted"]
        for text, lighter in self._lighter(plan):
            need = self.predict(lighter).total
            # Not less where an evaluation has the peak; the step that failed may still fit then.
            if need <= now:
                words.append(f"{text}: {binary_bytes(need)}")
        words.append("cut the layers over more ranks (parallel.pipeline), or take a smaller model")
        return ", ".join(words)

    def _lighter(self, plan: StepPlan) -> Iterator[tuple[str, StepPlan]]:
        """Yield the settings that may need less, with the plan that they give."""
        if plan.microbatch > 1:
            yield (
                f"train.microbatch = 1 for {plan.microbatch} (the batch stays as it is)",
                replace(plan, microbatch=1),
            )
        if plan.recompute != "full" and "full" in self.recipe.model.recomputes:
            yield 'train.recompute = "full"', replace(plan, recompute="full")
        if plan.precision.device == "cuda" and not plan.precision.has_masters:
            lower = replace(plan.precision, dtype="bfloat16")
            yield "train.dtype = bfloat16", replace(plan, precision=lower)


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the largest memory of this process so far: on a GPU the peak of torch's allocator,
    else the high-water mark of the resident set.
    """
    if device == "cpu":
        return peak_resident_bytes()
    import torch

    return torch.cuda.max_memory_allocated()


def compare_text(predicted: int, measured: int) -> str:
    """Write the line of a run's end."""
    return (
        f"memory of the largest rank: {binary_bytes(predicted)} predicted, "
        f"{binary_bytes(measured)} measured (ratio {predicted / max(1, measured):.2f})"
    )


def shortage(
    estimate: MemoryEstimate, node_map: NodeMap, memory: int, remedy: Callable[[], str]
) -> str:
    """Return a warning where the ranks of a host may need more than its `memory`, else "".

    `memory`: what the job may use of one host, in bytes; 0: unknown. `remedy` is called for a
    warning alone: it predicts the memory of other settings.
    """
    ranks = max(map(len, node_map.nodes))
    if not memory or ranks * estimate.on_node <= memory:
        return ""
    return (
        f"{ranks} rank(s) of a host may need {binary_bytes(ranks * estimate.on_node)}, and it has "
        f"{binary_bytes(memory)}: {remedy()}"
    )


def check_memory(
    recipe: Recipe, node_map: NodeMap, memory: int, hosts_compute: bool = True
) -> None:
    """Raise LayoutError where the weights with their state, or a batch, exceed all hosts' memory.

    `memory`: what the job may use of one host, in bytes; 0: unknown. Activations and Python come on
    top, so a model that passes may still be too large; one that is refused cannot be held. Without
    `hosts_compute` the weights are elsewhere: the batch alone is checked.
    """
    model, zero = recipe.model, recipe.parallel.zero
    # The ranks of a pipeline share the layers, those of a tensor axis each layer.
    ranks, shares = node_map.size, max(1, recipe.parallel.pipeline) * recipe.parallel.tensor
    replicas, nodes = max(1, ranks // shares), len(node_map.nodes)
    experts = recipe.parallel.experts
    shared = model.expert_parameters_of(model.whole) if experts > 1 else 0
    weights = FLOAT32_BYTES * (model.parameters - shared)
    state = recipe.optimizer.state_bytes(model, model.whole)
    of_experts = state * shared // model.parameters
    state -= of_experts
    # ZeRO has the state once, then the gradients, then the weights on each node.
    # A host has the weights once for all of its ranks that share them. Those that share no memory
    # hold their shards, and gather the rest block by block.
    most = max(map(len, node_map.nodes))
    once = node_map.even and most > 1
    copies = (-(-replicas // most) if once else 1) if zero == 3 else replicas
    needed = weights * copies
    needed += weights * (1 if zero >= 2 else replicas) + state * (1 if zero else replicas)
    # Weights and gradients of experts, once in each group that shares them out.
    needed += (2 * FLOAT32_BYTES * shared + of_experts) * max(1, replicas // experts)
    there = memory * nodes
    if memory and hosts_compute and needed > there:
        raise LayoutError(
            f"the model has {model.parameters:,} parameters, which need {binary_bytes(needed)} "
            f"for weights, gradients and optimizer on {ranks} rank(s), and the host(s) have "
            f"{binary_bytes(there)}; use a smaller model (vocabulary {model.vocab_size:,}, "
            f"{model.blocks:,} layers), fewer replicas (parallel.pipeline), shards of them "
            "(parallel.zero = 3), or more hosts"
        )
    batch = TOKEN_BYTES * recipe.train.batch * model.context
    if memory and batch > there:
        raise LayoutError(
            f"train.batch = {recipe.train.batch:,} sequences of {model.context:,} tokens are "
            f"{binary_bytes(batch)} of ids alone, and the host(s) have {binary_bytes(there)}; "
            "use a smaller batch"
        )
