"""What ranks tell each other of a step, in one message a rank: losses, waiting, memory, and who wants to stop."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.comm.mesh import Mesh, coordinates
from mpillm.parallel.sharded_model import Passes
from mpillm.parallel.step_plan import StepPlan

Floats = np.ndarray[Any, np.dtype[np.float64]]
# Columns of a rank's row ahead of its losses: when its passes began and ended, what of that it computed, how long it
# summed gradients thereafter, its memory, its wish, and whether it has losses.
BEGIN, END, BUSY, SUMMED, MEMORY, WISH, HAS_LOSSES, LOSSES = range(8)


@dataclass(frozen=True)
class StepStats:
    """The same on every rank."""

    losses: dict[int, list[float]]
    """By the rank that has them: the sum over a microbatch's tokens, each scaled by the batch's."""
    bubble: float
    """Waiting over computing in the pipelines, their mean; 0 without one."""
    data_seconds: float
    """A rank's mean of summing gradients along the data axis: behind the backward pass, what was left of it."""
    pipeline_seconds: float
    """A rank's mean of waiting for its neighbours in the pipeline."""
    memory_bytes: int
    """The most that a rank ever had in memory."""
    wishes: list[int]
    """By rank: see stopping.py."""


def gather_stats(
    mesh: Mesh,
    layout: StepPlan,
    passes: Passes,
    clock_offset: float,
    wish: int,
    pipelines: Sequence[Sequence[int]],
) -> StepStats:
    """Tell the others of this rank's passes and its wish, and hear theirs. Every rank of the mesh calls it."""
    spans = passes.spans
    own = np.zeros(LOSSES + layout.microbatches)
    own[BEGIN], own[END] = spans[0].begin - clock_offset, spans[-1].end - clock_offset
    own[BUSY] = sum(span.end - span.begin for span in spans)
    own[SUMMED], own[MEMORY], own[WISH] = passes.summed - passes.ended, peak_memory_bytes(), wish
    own[HAS_LOSSES] = bool(passes.losses)
    own[LOSSES : LOSSES + len(passes.losses)] = passes.losses
    every = np.empty((mesh.comm.size, own.size))
    mesh.comm.Allgather(own, every)
    return read(every, pipelines, mesh.sizes["data"])


def read(every: Floats, pipelines: Sequence[Sequence[int]], data: int) -> StepStats:
    """What the rows of all ranks say. `pipelines`: the ranks of each; none where each has one. `data`: of the axis."""
    begins, ends, busy = every[:, BEGIN], every[:, END], every[:, BUSY]
    return StepStats(
        {rank: row[LOSSES:].tolist() for rank, row in enumerate(every) if row[HAS_LOSSES]},
        measured_bubble(begins, ends, busy, pipelines),
        float(every[:, SUMMED].mean()) if data > 1 else 0.0,
        _mean([_window(begins, ends, group) - busy[list(group)].mean() for group in pipelines]),
        int(every[:, MEMORY].max()),
        [int(wish) for wish in every[:, WISH]],
    )


def pipelines_of(mesh: Mesh, layout: StepPlan) -> list[list[int]]:
    """The ranks of each pipeline; none where each has one rank."""
    if layout.schedule.ranks == 1:
        return []
    found: dict[int, list[int]] = {}
    for rank in range(mesh.comm.size):
        found.setdefault(coordinates(rank, mesh.sizes)["data"], []).append(rank)
    return list(found.values())


def measured_bubble(
    begins: Floats, ends: Floats, busy: Floats, groups: Sequence[Sequence[int]]
) -> float:
    """Waiting over computing, as simulating.Timeline counts it, of each group of ranks; their mean. All by rank."""
    return _mean([_window(begins, ends, group) / busy[list(group)].mean() - 1 for group in groups])


def _window(begins: Floats, ends: Floats, group: Sequence[int]) -> float:
    """Seconds from a group's first pass to its last."""
    return float(ends[list(group)].max() - begins[list(group)].min())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def peak_memory_bytes() -> int:
    """The most that this process ever had in memory: its resident set's high-water mark (getrusage, in KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
