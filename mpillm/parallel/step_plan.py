"""The plan of a training step: ranks along the axes, stages along the pipeline, microbatches.

A plan is plain data, made and checked before the first message. It needs no torch: a login node can
make it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mpillm.comm.mesh import Mesh, by_hosts
from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.models.spec import ModelSpec, Part, Recompute
from mpillm.models.tuning import ALL_WEIGHTS, Tuning
from mpillm.parallel import axis_sizes
from mpillm.parallel.axis_sizes import mesh_sizes
from mpillm.parallel.expert.expert_groups import exchange_bytes
from mpillm.parallel.parallel_axis import MessageBytes
from mpillm.parallel.pipeline.actions import PipelineSchedule
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.partition import partition_blocks
from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from mpillm.parallel.pipeline.simulate import Costs, Timeline, simulate
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.teacher_plan import TeacherPlan

if TYPE_CHECKING:
    from mpi4py import MPI

# Default microbatches a rank of a pipeline. The bubble of 1F1B is (p − 1)/m, so m = 4p keeps it
# below a quarter.
MICROBATCHES_A_RANK = 4
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Precision:
    """The device and the dtypes of a step.

    With a lower `dtype` than float32 the optimizer steps on float32 masters of the weights, and
    gradients are accumulated in float32 (Micikevicius et al. 2018, "Mixed precision training").
    """

    device: str = "cpu"
    """torch's name of the device."""
    dtype: str = "float32"
    """Of weights, activations and the streams between stages."""
    reduce_dtype: str = "float32"
    """Of the sums of gradients over ranks."""

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a weight or an activation."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps on float32 masters, and not on the weights."""
        return self.dtype != "float32"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would underflow without a scaled loss: float16 has 5 exponent bits."""
        return self.dtype == "float16"


@dataclass(frozen=True)
class StepPlan:
    """How one step is computed. `rows`: the sequences of the batch that a data rank takes."""

    schedule: PipelineSchedule
    parts: tuple[Part, ...]
    """The part of the model that each stage holds."""
    rows: int
    microbatch: int
    precision: Precision = Precision()
    fixed_order: bool = False
    """Sum gradients in one tree over all microbatches of all ranks: bits free of the layout."""
    compiled: bool = False
    """Compile the model's layers by torch.compile."""
    recompute: Recompute = "none"
    """The activations that backward passes compute again."""
    context: int = 1
    """Ranks that share the positions of each sequence."""
    tuning: Tuning = ALL_WEIGHTS
    """The weights that are trained."""
    teacher: TeacherPlan | None = None
    """The model that the run learns from."""

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The names of the parts of a loss that steps record next to it."""
        return self.teacher.settings.parts if self.teacher else ()

    @property
    def microbatches(self) -> int:
        return self.schedule.microbatches

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated schedule with even stages, in units of one pass."""
        return simulate(self.schedule, Costs.even(self.schedule.stages))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The first row, and the row after the last, of each microbatch.

        Without a pipeline the last microbatch may be short.
        """
        firsts = range(0, self.rows, self.microbatch)
        return [(first, min(first + self.microbatch, self.rows)) for first in firsts]


def make_mesh(
    comm: "MPI.Intracomm",
    settings: ParallelSettings,
    model: ModelSpec,
    batch: int,
    node_map: NodeMap | None = None,
) -> Mesh:
    """Make the mesh: ranks ordered by host, the axis with most traffic innermost.

    The innermost axis then stays within a node where it can. `batch`: sequences of the global
    batch. `node_map`: of `comm`; None asks MPI for it. Every rank of `comm` calls it. Raises
    LayoutError.
    """
    ordered = mesh_order(settings, comm.size, model, batch)
    by_host, node_map = by_hosts(comm, node_map or map_nodes(comm))
    return Mesh(by_host, ordered, node_map)


def mesh_order(
    settings: ParallelSettings, ranks: int, model: ModelSpec, batch: int
) -> dict[str, int]:
    """Return the sizes of the mesh's axes, the axis with most traffic last. Raises LayoutError."""
    sizes = mesh_sizes(settings, ranks, model, batch)
    # The number of chunks is not resolved yet; it only scales the pipeline's traffic.
    traffic = traffic_bytes(sizes, model, batch, max(1, settings.chunks), settings=settings)
    outermost = axis_sizes.outermost_axes(sizes)
    ordered = sorted(sizes, key=lambda axis: (axis not in outermost, traffic[axis]))
    return {axis: sizes[axis] for axis in ordered}


def traffic_bytes(
    sizes: dict[str, int],
    model: ModelSpec,
    batch: int,
    chunks: int,
    precision: Precision | None = None,
    settings: ParallelSettings | None = None,
    microbatches: int = 1,
    gathers: float = 0.0,
    tuning: Tuning = ALL_WEIGHTS,
) -> dict[str, float]:
    """Estimate the bytes that a rank sends along each axis in a step; None: all in float32.

    `settings`: of islands, ZeRO and experts; None for the defaults. `microbatches`: of a rank.
    `gathers`: how often a step gathers a weight, the mean (`plan.gather_count.gathers_a_step`).
    `tuning`: which weights have gradients.
    """
    settings, precision = settings or ParallelSettings(), precision or Precision()
    # ZeRO reduce-scatters each microbatch from stage 2 on, and gathers the values up to stage 2.
    sums = microbatches if settings.zero > 1 else 1
    values: float = settings.zero < 3
    if gathers:
        # Values have the bytes of the weights.
        values = gathers * precision.element_bytes / ELEMENT_BYTES[precision.reduce_dtype]
    share = tuning.share_of(model)
    element = MessageBytes(
        precision.element_bytes,
        ELEMENT_BYTES[precision.reduce_dtype] * share,
        sums + values,
        ELEMENT_BYTES[settings.island_dtype] / settings.island_every * share,
        settings.context_kind,
        precision.device,
    )
    sent = {
        axis.name: axis.traffic_bytes(sizes, model, batch, chunks, element)
        for axis in axis_sizes.AXES
        if axis.name in sizes
    }
    # Neighbours share the experts. Where they cannot, check_experts refuses it later.
    along = [name for name in axis_sizes.token_axes(sizes) if sizes[name] > 1]
    if settings.experts > 1 and along:
        sent[along[-1]] += exchange_bytes(settings.experts, model, sizes, batch, element)
    return sent


def scored_ahead(ranks: int) -> int:
    """Return how many batches of an evaluation a pipeline of `ranks` passes on before its first
    rank waits for the others; 0: any number, as there is no other rank.
    """
    return 2 * ranks if ranks > 1 else 0


def flat_gradients(plan: StepPlan) -> bool:
    """Return whether gradients are in buckets even where no other rank adds to them.

    Gradients of one microbatch take the place of its activations, which the backward pass frees.
    Those of several would remain between the activations of the next one. glibc's malloc cannot
    use the gaps again, for an aligned array needs a little more than its size: the peak of 12
    layers of width 512 with recomputation was 1,447 MiB, and is 1,285 with buckets.
    """
    return plan.microbatches > 1 and plan.precision.device == "cpu"


def replica_share(mesh: Mesh, apart: Collection[str] = ()) -> tuple[int, int]:
    """Return (i, n): this rank is the i-th of the n ranks that hold the same weights.

    Those ranks differ along the axes that do not cut weights. They share the work on replicated
    weights, so that each weight counts once. Ranks that differ along an axis in `apart` share none.
    """
    # Row-major over the axes, as coordinates are.
    index, count = 0, 1
    for axis in axis_sizes.AXES:
        own = axis.cuts_weights or axis.trains_apart or axis.name in apart
        if axis.name in mesh.sizes and not own:
            index = index * mesh.sizes[axis.name] + mesh.coordinates[axis.name]
            count *= mesh.sizes[axis.name]
    return index, count


def plan_step(
    model: ModelSpec,
    settings: ParallelSettings,
    data: int,
    batch: int,
    microbatch: int = 0,
    *,
    precision: Precision = Precision(),
    fixed_order: bool = False,
    recompute: Recompute = "none",
) -> StepPlan:
    """Resolve and check all choices for `data` ranks that share a batch of `batch` sequences, which
    `data` divides.

    `microbatch`: sequences at once; 0: chosen here. Raises LayoutError.
    """
    _check_recompute(model, recompute)
    if fixed_order and settings.tensor > 1:
        raise LayoutError(
            f"train.fixed_order keeps the bits of sums, and parallel.tensor = {settings.tensor} "
            "cuts the products themselves into other sums; leave one of them out"
        )
    # mesh_sizes has checked that `data` divides the batch.
    rows, pipeline = batch // data, settings.pipeline
    if fixed_order and not microbatch:
        raise LayoutError(
            "train.fixed_order sums by microbatch, so the same microbatches must be cut in every "
            f"layout; set train.microbatch to a divisor of {rows}, such as 1"
        )
    chosen = _microbatch(rows, pipeline) if pipeline > 1 else rows
    microbatch = min(microbatch, rows) or chosen
    if (pipeline > 1 or fixed_order) and rows % microbatch:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise LayoutError(
            f"train.microbatch = {microbatch} must divide the {rows} sequences that each of "
            f"{data} data rank{'s' * (data > 1)} takes of a batch; take one of {divisors}, "
            "or change train.batch"
        )
    schedule = _schedule(settings, -(-rows // microbatch))
    wanted = settings.stages if pipeline > 1 else "auto"
    parts = partition_blocks(model, schedule.stages, wanted, recompute)
    if fixed_order:
        _check_fixed_order(schedule, data, settings.context)
    return StepPlan(
        schedule,
        tuple(parts),
        rows,
        microbatch,
        precision,
        fixed_order,
        recompute=recompute,
        context=settings.context,
    )


def check_small_batches(plan: StepPlan, data: int, zero: int = 0) -> None:
    """Raise LayoutError where the step of `data` data ranks has no equal small batches.

    `zero`: the stage of ZeRO, with which no rank has its whole gradients.
    """
    if zero:
        raise LayoutError(
            "train.noise_scale compares the whole gradients of data ranks, and parallel.zero = "
            f"{zero} shares them out; measure it with parallel.zero = 0, or leave it out"
        )
    if data > 1 or (plan.microbatches > 1 and plan.rows % plan.microbatch == 0):
        return
    divisors = [str(n) for n in range(1, plan.rows) if plan.rows % n == 0]
    remedy = (
        f"set train.microbatch to one of {', '.join(divisors)}" if divisors else "raise train.batch"
    )
    raise LayoutError(
        "train.noise_scale compares equal small batches with their sum, and one data rank "
        f"computes {plan.rows} sequences as {plan.microbatches} microbatch(es) of "
        f"{plan.microbatch}; {remedy}, or use more data ranks"
    )


def _microbatch(rows: int, pipeline: int) -> int:
    """Return the largest divisor of `rows` that leaves enough microbatches; 1 where none does."""
    wanted = MICROBATCHES_A_RANK * pipeline
    divisors: Sequence[int] = [n for n in range(1, rows + 1) if rows % n == 0]
    return max((n for n in divisors if rows // n >= wanted), default=1)


def _schedule(settings: ParallelSettings, microbatches: int) -> PipelineSchedule:
    if settings.pipeline == 1:
        # A single rank waits for no other: forward and backward alternate, which keeps the
        # activations of one microbatch alive.
        return make_schedule("1f1b", 1, microbatches)
    schedule = make_schedule(settings.schedule, settings.pipeline, microbatches, settings.chunks)
    check(schedule)
    return schedule


def _check_recompute(model: ModelSpec, recompute: Recompute) -> None:
    kind = "full" if isinstance(recompute, int) else recompute
    if kind != "none" and kind not in model.recomputes:
        can = " or ".join(model.recomputes) or "no activations"
        raise LayoutError(
            f"train.recompute = {recompute!r}: the architecture {model.architecture!r} recomputes "
            f"{can}; leave train.recompute out"
        )
    if isinstance(recompute, int) and not 1 <= recompute <= model.blocks:
        raise LayoutError(
            f"train.recompute = {recompute} recomputes one layer in {recompute}, and the model "
            f"has {model.blocks}; take 1 (each layer) to {model.blocks}"
        )


def _check_fixed_order(schedule: PipelineSchedule, data: int, context: int) -> None:
    if context > 1:
        raise LayoutError(
            f"train.fixed_order gives every layout the same bits, and parallel.context = {context} "
            "adds up the terms of attention and gradients by rank; leave one of them out"
        )
    microbatches = schedule.microbatches
    if data > 1 and microbatches & (microbatches - 1):
        raise LayoutError(
            "train.fixed_order sums the microbatches of all data ranks in one binary tree, so each "
            f"rank's must be a branch of it: a power of two, not {microbatches}; change "
            "train.microbatch, train.batch or parallel.data"
        )
    if not ascending(schedule):
        raise LayoutError(
            "train.fixed_order needs each stage to take the microbatches in ascending order, and "
            f"{schedule.name} does not; order its rows so, or take another schedule"
        )
