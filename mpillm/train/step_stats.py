"""Exchange the numbers of a step: losses, times, memory and stop requests, one message a rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from mpillm.comm.mesh import Mesh, coordinates
from mpillm.parallel import axis_sizes
from mpillm.parallel.parallel_axis import RankTimes
from mpillm.parallel.passes import Passes
from mpillm.parallel.pipeline.pipeline_axis import measured_bubble
from mpillm.parallel.step_plan import StepPlan
from mpillm.train.run_memory import peak_memory_bytes

Floats = np.ndarray[Any, np.dtype[np.float64]]
# Columns of a rank's row; the losses follow in the order of the microbatches, then those of each
# part of the loss.
BEGIN, END, BUSY, REDUCING, MEMORY, STOP, HAS_LOSSES, LOSSES = range(8)


@dataclass(frozen=True)
class StepStats:
    """The statistics of one step, the same on every rank."""

    losses: dict[int, list[float]]
    """By the rank that counts them: each microbatch's summed loss, over the weight of the batch."""
    bubble: float
    """Waiting over computing in the pipelines, their mean; 0 without one."""
    wait_seconds: dict[str, float]
    """Axis → a rank's mean wait along it; axes without any are left out."""
    memory_bytes: int
    """The largest peak of a rank: of the resident set, or of torch's allocator on a GPU."""
    stops: list[int]
    """By rank: its stop request (stopping.py)."""
    parts: dict[str, float] = field(default_factory=dict)
    """The parts of the loss by name, each as `loss`."""

    @property
    def loss(self) -> float:
        """The mean loss of the global batch.

        math.fsum rounds once, so neither the order nor the layout changes the bits.
        """
        return math.fsum(loss for losses in self.losses.values() for loss in losses)


def gather_stats(
    mesh: Mesh, passes: Passes, plan: StepPlan, clock_offset: float, stop: int
) -> StepStats:
    """Gather the passes and the stop request of each rank. Every rank of the mesh calls it."""
    spans = passes.spans
    own = np.zeros(LOSSES + plan.microbatches * (1 + len(plan.loss_parts)))
    own[BEGIN], own[END] = spans[0].begin - clock_offset, spans[-1].end - clock_offset
    own[BUSY] = sum(span.end - span.begin for span in spans)
    own[REDUCING] = passes.summed - passes.ended
    own[MEMORY] = peak_memory_bytes(plan.precision.device)
    own[STOP], own[HAS_LOSSES] = stop, bool(passes.losses)
    if passes.losses:
        own[LOSSES:] = np.concatenate([passes.losses, *passes.parts])
    # One Allgather: losses and stop requests of a step arrive together, so all ranks stop alike.
    every = np.empty((mesh.comm.size, own.size))
    mesh.comm.Allgather(own, every)
    return read_stats(every, mesh.sizes, plan.loss_parts)


def read_stats(every: Floats, sizes: Mapping[str, int], parts: Sequence[str] = ()) -> StepStats:
    """Read the rows of all ranks of a mesh of `sizes`; `parts`: the names of the loss's parts."""
    times = RankTimes(every[:, BEGIN], every[:, END], every[:, BUSY], every[:, REDUCING])
    groups = _all_groups(tuple(sizes.items()))
    waits = {
        axis.name: axis.wait_seconds(times, groups[axis.name])
        for axis in axis_sizes.AXES
        if axis.name in groups
    }
    counted = [
        rank
        for rank, row in enumerate(every)
        if row[HAS_LOSSES] and axis_sizes.counts_loss(coordinates(rank, sizes))
    ]
    # Rank, part, microbatch: the loss is the first part.
    numbers = every[:, LOSSES:].reshape(len(every), 1 + len(parts), -1)
    return StepStats(
        {rank: numbers[rank, 0].tolist() for rank in counted},
        measured_bubble(times, groups["pipeline"]) if "pipeline" in groups else 0.0,
        {name: seconds for name, seconds in waits.items() if seconds},
        int(every[:, MEMORY].max()),
        [int(stop) for stop in every[:, STOP]],
        {name: math.fsum(numbers[counted, part].flat) for part, name in enumerate(parts, start=1)},
    )


@lru_cache(maxsize=4)
def _all_groups(sizes: tuple[tuple[str, int], ...]) -> dict[str, list[list[int]]]:
    """Return the groups of every axis: made once a job, for they depend on the mesh alone."""
    return {name: axis_groups(dict(sizes), name) for name, _ in sizes}


def axis_groups(sizes: Mapping[str, int], name: str) -> list[list[int]]:
    """List the groups of ranks that differ along the axis `name` alone, in rank order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        place = coordinates(rank, sizes)
        others = tuple(place[other] for other in sizes if other != name)
        groups.setdefault(others, []).append(rank)
    return list(groups.values())


def check_finite(step: int, losses: Mapping[int, Sequence[float]], norm: float) -> str:
    """Say what is not finite at `step` (from 0), "" where all is; the same on every rank."""
    bad = {rank: row for rank, row in losses.items() if not np.isfinite(row).all()}
    if bad:
        from mpillm.comm.failure import ranks_text

        first = next(loss for row in bad.values() for loss in row if not math.isfinite(loss))
        return f"at step {step + 1} the loss of {ranks_text(list(bad))} is {first}"
    if not math.isfinite(norm):
        return f"at step {step + 1} the norm of the summed gradients is {norm} on all ranks"
    return ""
