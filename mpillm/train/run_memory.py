"""The memory of a run: predicted before it, measured after it, and what lets a rank need less."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mpillm.errors import LayoutError
from mpillm.machine.memory import peak_resident_bytes, resident_bytes
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.step_plan import StepPlan
from mpillm.plan.held_memory import Replicas
from mpillm.plan.memory_table import MemoryTable
from mpillm.plan.peak_memory import PROCESS_BYTES, MemoryEstimate, predict_peak, rows_at_once
from mpillm.plan.rank_loads import load_ranks, replicas_of
from mpillm.system.console import binary_bytes
from mpillm.train.recipe import Recipe

if TYPE_CHECKING:
    from mpillm.comm.mesh import Mesh


@dataclass(frozen=True)
class RunMemory:
    """Predict and measure the peak of a run's ranks."""

    recipe: Recipe
    sizes: Mapping[str, int]
    """Of the mesh."""
    node_map: NodeMap
    """Of its ranks, which are ordered by node."""
    process_bytes: int = PROCESS_BYTES
    """The largest resident set of a rank before its model is built."""
    rank: int = 0

    @classmethod
    def of(cls, recipe: Recipe, mesh: "Mesh") -> "RunMemory":
        """Measure what the processes take so far. Every rank calls it, before a model is built."""
        process_bytes = max(mesh.comm.allgather(resident_bytes()))
        return cls(recipe, mesh.sizes, mesh.node_map, process_bytes, mesh.comm.rank)

    def with_reference(self, plan: StepPlan, writes_answers: bool) -> "RunMemory":
        """Return it for ranks that hold the frozen copy of the weights which `task.kl` compares.

        `writes_answers`: whether the task does so in training; others have no such copy.
        """
        if not (writes_answers and self.recipe.task.kl):
            return self
        nbytes = self.recipe.model.parameters * plan.precision.element_bytes
        return replace(self, process_bytes=self.process_bytes + nbytes)

    @cached_property
    def replicas(self) -> Replicas:
        """The ranks that sum gradients with this one."""
        return replicas_of(self.rank, self.sizes, self.node_map, self.recipe.parallel)

    def table(self, plan: StepPlan) -> MemoryTable:
        """Estimate the peaks of all ranks and hosts, with the settings of `plan`."""
        loads = load_ranks(
            self.recipe.model,
            plan,
            self.recipe.optimizer,
            self.sizes,
            self.node_map,
            self.recipe.parallel,
            self.process_bytes,
        )
        return MemoryTable.of(loads, plan.precision.device)

    def check_hosts(self, plan: StepPlan, memory: Sequence[int], force: bool = False) -> str:
        """Raise LayoutError with the table where a host needs more than its `memory`.

        `memory`: what the job may use of each host, in bytes; 0: unknown. With `force` return the
        message instead, as a warning; "" where the hosts have enough.
        """
        table = self.table(plan)
        host = table.shortest(memory)
        if host is None:
            return ""
        message = f"{table.excess(memory)}:\n{table.text()}\n{self.host_remedy(plan, host)}"
        if not force:
            raise LayoutError(f"{message}; or train all the same, with --force")
        return f"{message}; --force trains all the same"

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
        for text, memory, lighter in self._lighter(plan):
            need = memory.predict(lighter).total
            # Not less where an evaluation has the peak; the step that failed may still fit then.
            if need <= now:
                words.append(f"{text}: {binary_bytes(need)}")
        words.append("cut the layers over more ranks (parallel.pipeline), or take a smaller model")
        return ", ".join(words)

    def host_remedy(self, plan: StepPlan, host: int) -> str:
        """Say which settings let the ranks of `host` need less memory together, and how much."""
        now = self.table(plan).nodes[host].total
        needs = [
            (text, memory.table(lighter).nodes[host].total)
            for text, memory, lighter in self._lighter(plan)
        ]
        words = [f"{text}: {binary_bytes(need)} on the host" for text, need in needs if need < now]
        words.append("cut the layers over more hosts (parallel.pipeline), or take a smaller model")
        return ", ".join(words)

    def _lighter(self, plan: StepPlan) -> Iterator[tuple[str, "RunMemory", StepPlan]]:
        """Yield the settings that may need less, with the run and the plan that they give."""
        train, parallel = self.recipe.train, self.recipe.parallel
        if plan.microbatch > 1:
            yield (
                f"train.microbatch = 1 for {plan.microbatch} (the batch stays as it is)",
                self,
                replace(plan, microbatch=1),
            )
        if plan.recompute != "full" and "full" in self.recipe.model.recomputes:
            yield 'train.recompute = "full"', self, replace(plan, recompute="full")
        # Both settings may refuse shards.
        refused = train.noise_scale or train.compile
        if self.replicas.ranks > 1 and parallel.zero < 3 and not refused:
            recipe = replace(self.recipe, parallel=replace(parallel, zero=3))
            yield "parallel.zero = 3", replace(self, recipe=recipe), plan
        if plan.precision.device == "cuda" and not plan.precision.has_masters:
            lower = replace(plan.precision, dtype="bfloat16")
            yield "train.dtype = bfloat16", self, replace(plan, precision=lower)


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
