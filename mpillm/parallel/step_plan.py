"""How a training step is laid out: ranks along the axes, stages along the pipeline, microbatches along the step."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mpillm.comm.mesh import Mesh, by_hosts
from mpillm.errors import LayoutError
from mpillm.models.config import DecoderConfig
from mpillm.models.decoder import Part
from mpillm.parallel.axis_sizes import mesh_sizes
from mpillm.parallel.pipeline.actions import PipelineSchedule
from mpillm.parallel.pipeline.catalog import make_schedule
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.partition import share_layers
from mpillm.parallel.pipeline.simulate import Costs, Timeline, simulate
from mpillm.parallel.settings import ParallelSettings

if TYPE_CHECKING:
    from mpi4py import MPI

# Where nothing else is asked for, a pipeline gets so many microbatches a rank: its bubble is then a quarter at most.
MICROBATCHES_A_RANK = 4


@dataclass(frozen=True)
class StepPlan:
    """`rows`: the sequences that a rank of the data axis takes of each batch, in microbatches of `microbatch`."""

    schedule: PipelineSchedule
    parts: tuple[Part, ...]
    """Of the model, a stage each."""
    rows: int
    microbatch: int

    @property
    def microbatches(self) -> int:
        return self.schedule.microbatches

    @cached_property
    def timeline(self) -> Timeline:
        """The schedule as it would run with even stages, in the time of one pass."""
        return simulate(self.schedule, Costs.even(self.schedule.stages))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The first and last + 1 row of each microbatch; the last one may be short where there is no pipeline."""
        firsts = range(0, self.rows, self.microbatch)
        return [(first, min(first + self.microbatch, self.rows)) for first in firsts]


def make_mesh(
    comm: "MPI.Intracomm", settings: ParallelSettings, config: DecoderConfig, batch: int
) -> Mesh:
    """The mesh of the ranks in the order of their hosts, the axis that moves most bytes innermost: that one stays
    within a node where it can. Every rank of `comm` calls it. `batch`: sequences of the global batch.
    """
    sizes = mesh_sizes(settings, comm.size, config.layers, batch)
    traffic = traffic_bytes(sizes, config, batch, max(1, settings.chunks))
    ordered = dict(sorted(sizes.items(), key=lambda axis: traffic[axis[0]]))
    return Mesh(by_hosts(comm), ordered)


def traffic_bytes(
    sizes: dict[str, int], config: DecoderConfig, batch: int, chunks: int
) -> dict[str, float]:
    """What a rank sends along each axis in a step, about: gradients twice round the data axis, the stream of its share
    of the batch and its gradient once through each stage.
    """
    data, pipeline = sizes["data"], sizes["pipeline"]
    gradients = 4 * config.parameters / pipeline
    stream = 4 * batch / data * config.context * config.width
    return {
        "data": 2 * gradients * (data - 1) / data,
        "pipeline": 2 * stream * chunks if pipeline > 1 else 0.0,
    }


def plan_layout(
    config: DecoderConfig,
    settings: ParallelSettings,
    data: int,
    rows: int,
    microbatch: int,
    fixed_order: bool = False,
) -> StepPlan:
    """Resolve and check all choices; `rows`: sequences of a batch for each of `data` ranks, `microbatch`: as many at
    once, 0: chosen here. Raises LayoutError.
    """
    pipeline = settings.pipeline
    if fixed_order and not microbatch:
        raise LayoutError(
            "train.fixed_order sums by microbatch, so the same microbatches must be cut in every layout; set "
            f"train.microbatch to a divisor of {rows}, such as 1"
        )
    microbatch = min(microbatch, rows) or (_microbatch(rows, pipeline) if pipeline > 1 else rows)
    if (pipeline > 1 or fixed_order) and rows % microbatch:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise LayoutError(
            f"train.microbatch = {microbatch} must divide the {rows} sequences that each of {data} data "
            f"rank{'s' * (data > 1)} takes of a batch; take one of {divisors}, or change train.batch"
        )
    schedule = _schedule(settings, -(-rows // microbatch))
    parts = share_layers(config, schedule.stages, settings.stages if pipeline > 1 else "auto")
    if fixed_order:
        _check_fixed_order(schedule, data)
    return StepPlan(schedule, tuple(parts), rows, microbatch)


def _microbatch(rows: int, pipeline: int) -> int:
    """The largest divisor of `rows` that leaves enough microbatches; 1 where none does."""
    wanted = MICROBATCHES_A_RANK * pipeline
    return max((n for n in range(1, rows + 1) if rows % n == 0 and rows // n >= wanted), default=1)


def _schedule(settings: ParallelSettings, microbatches: int) -> PipelineSchedule:
    if settings.pipeline == 1:
        # One rank has nobody to wait for: each microbatch forwards and backwards.
        return make_schedule("1f1b", 1, microbatches)
    schedule = make_schedule(settings.schedule, settings.pipeline, microbatches, settings.chunks)
    check(schedule)
    return schedule


def _check_fixed_order(schedule: PipelineSchedule, data: int) -> None:
    microbatches = schedule.microbatches
    if data > 1 and microbatches & (microbatches - 1):
        raise LayoutError(
            f"train.fixed_order sums the microbatches of all data ranks in one binary tree, so each rank's must be a "
            f"branch of it: a power of two, not {microbatches}; change train.microbatch, train.batch or parallel.data"
        )
    if not ascending(schedule):
        raise LayoutError(
            f"train.fixed_order needs each stage to take the microbatches in ascending order, and {schedule.name} does "
            "not; order its rows so, or take another schedule"
        )
