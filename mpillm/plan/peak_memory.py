"""Predict the peak memory of a rank in training: pure functions over settings, for every planner.

On a CPU it is the peak resident set of the process, on a GPU the peak of torch's allocator. The
peak of a step is at the loss, or where a backward pass begins: the activations of all microbatches
in flight, and what one block or the loss needs above them. What persists is added: weights, state,
and on a CPU the process itself.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol

from mpillm.models.spec import ModelSpec, Part
from mpillm.parallel.step_plan import StepPlan, flat_gradients, scored_ahead
from mpillm.system.console import binary_bytes

# The resident set of Python, torch's CPU build, MPI and h5py before a model is built (Open MPI 5,
# torch 2.13, x86-64: 268 to 277 MiB). A run measures its own.
PROCESS_BYTES = 272 << 20
# What the first steps load: pages of kernels, work buffers of matrix products, the metrics' files.
LIBRARY_BYTES = 32 << 20
# What glibc's malloc holds of a step's arrays in gaps that it cannot use again, as a share of their
# bytes. An aligned array needs a little more than its size, so one of the same size does not fit
# where the last one was. Measured on glibc 2.36: 0.3 to 0.5 of a step, and 1 to 2 of a block that
# is computed again, whose arrays come and go with each block.
GAP_SHARE, RECOMPUTED_GAP_SHARE = 0.4, 1.6
# Buffers of HDF5 and of the index of a checkpoint: tensors are written from where they are.
CHECKPOINT_BYTES = 2 << 20
# Receives that a channel posts ahead, and slots of its queue: executor.AHEAD, queue_setup.SLOTS.
POSTED, SLOTS = 2, 2
# torch's embedding reads ids of 8 bytes.
TOKEN_BYTES = 8
FLOAT32_BYTES = 4


class OptimizerCosts(Protocol):
    """The memory of an optimizer, as its settings give it."""

    def state_bytes(self, model: ModelSpec, part: Part) -> int: ...


@dataclass(frozen=True)
class Replicas:
    """The data axis: ranks that hold the same weights, and how many of them share a node."""

    ranks: int = 1
    on_node: int = 1
    """Ranks of the axis on one node that keep their gradients in shared memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one rank at its peak, by what takes them. Their sum is the peak."""

    process: int = 0
    """Python, torch, MPI and h5py, before the model is built."""
    libraries: int = 0
    weights: int = 0
    masters: int = 0
    """Float32 copies of weights of a lower dtype."""
    optimizer: int = 0
    gradients: int = 0
    """In buckets, or above what the activations leave to them when they are freed."""
    activations: int = 0
    """Kept for the backward pass, of all microbatches in flight."""
    recomputed: int = 0
    """The largest block in its backward pass, above the loss."""
    outputs: int = 0
    """A chunk of logits, and the gradients of hidden states and head."""
    streams: int = 0
    """Between the stages of a pipeline: queues, posted receives, a send."""
    attention: int = 0
    """Keys and values that the ranks of a context axis read of each other, and their gradients."""
    data: int = 0
    evaluation: int = 0
    """Above a step."""
    checkpoint: int = 0
    gaps: int = 0
    """Free memory between arrays that the allocator cannot use."""

    @property
    def items(self) -> dict[str, int]:
        """Name → bytes, in order, of those that are not 0."""
        named = {field.name: int(getattr(self, field.name)) for field in fields(self)}
        return {name: nbytes for name, nbytes in named.items() if nbytes}

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def describe(self) -> str:
        """Write the total, and the parts in MiB from the largest on."""
        mib = {name: round(nbytes / 2**20) for name, nbytes in self.items.items()}
        largest = sorted(mib, key=lambda name: -mib[name])
        parts = ", ".join(f"{name} {mib[name]:,}" for name in largest if mib[name])
        return f"about {binary_bytes(self.total)} ({parts} MiB)"


def held_bytes(model: ModelSpec, part: Part, optimizer: OptimizerCosts, element_bytes: int) -> int:
    """Return what persists of `part` on a rank: weights, masters, gradients, optimizer state."""
    count, has_masters = model.parameters_of(part), element_bytes < FLOAT32_BYTES
    masters = FLOAT32_BYTES * count * has_masters
    gradients = FLOAT32_BYTES * count
    return element_bytes * count + masters + gradients + optimizer.state_bytes(model, part)


def predict_peak(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    replicas: Replicas = Replicas(),
    process_bytes: int = PROCESS_BYTES,
    scored_rows: int = 1,
) -> MemoryEstimate:
    """Estimate the peak of the rank that needs most.

    `process_bytes`: of a process before it builds a model; a GPU's memory holds none of it.
    `scored_rows`: sequences at once in an evaluation; 0: there is none.
    """
    if plan.precision.device == "cpu":
        base = MemoryEstimate(
            process=process_bytes, libraries=LIBRARY_BYTES, checkpoint=CHECKPOINT_BYTES
        )
    else:
        base = MemoryEstimate()
    ranks = range(plan.schedule.ranks)
    every = [_of_rank(model, plan, optimizer, replicas, scored_rows, rank, base) for rank in ranks]
    return max(every, key=lambda estimate: estimate.total)


def _of_rank(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    replicas: Replicas,
    scored_rows: int,
    rank: int,
    base: MemoryEstimate,
) -> MemoryEstimate:
    parts = [plan.parts[stage] for stage in plan.schedule.stages_of(rank)]
    precision, rows = plan.precision, plan.microbatch
    element, device = precision.element_bytes, precision.device
    count = sum(map(model.parameters_of, parts))
    ends = any(map(model.ends, parts))
    activations, recomputed = _activations(model, plan, parts, rank)
    # Ranks of a context axis share the positions.
    outputs = model.output_bytes(rows, device) // plan.context if ends else 0
    block = recomputed + model.working_bytes(rows, element) // plan.context
    step = activations + max(outputs, block)
    gradients = _bucket_bytes(plan, replicas, count)
    kept_apart = bool(gradients)
    if not kept_apart:
        # Each gradient is allocated when activations of as many bytes or more are free.
        gradients = max(0, FLOAT32_BYTES * count - step)
    share, recomputed_share = (GAP_SHARE, RECOMPUTED_GAP_SHARE) if device == "cpu" else (0, 0)
    gaps = int(share * step + recomputed_share * recomputed)
    # The allocator returns a step's memory ahead of an evaluation (system/malloc.py), but not the
    # gradients, which stay until the next step.
    scoring = int((1 + share) * _scoring_bytes(model, plan, rank, scored_rows, ends))
    loose = 0 if kept_apart else FLOAT32_BYTES * count - gradients
    evaluation = max(0, scoring + loose - step - gaps)
    return replace(
        base,
        weights=element * count,
        masters=FLOAT32_BYTES * count if precision.has_masters else 0,
        optimizer=sum(optimizer.state_bytes(model, part) for part in parts),
        gradients=gradients,
        activations=activations,
        recomputed=max(0, block - outputs),
        outputs=outputs,
        streams=_stream_bytes(model, plan, rank, scored_rows),
        attention=_attention_bytes(model, plan, scored_rows),
        # Tokens as they are read, and as ids and targets.
        data=2 * TOKEN_BYTES * plan.rows * (model.context + 1),
        evaluation=evaluation,
        gaps=gaps,
    )


def _activations(model: ModelSpec, plan: StepPlan, parts: list[Part], rank: int) -> tuple[int, int]:
    """Return the bytes kept at once for backward passes, and those of the largest block above."""
    rows, element = plan.microbatch, plan.precision.element_bytes
    found = [model.recompute_bytes(part, rows, element, plan.recompute) for part in parts]
    kept, recomputed = sum(kept for kept, _ in found), max(again for _, again in found)
    whole = sum(model.activation_bytes(part, rows, element) for part in parts)
    # A rank stores the activations of `peaks` passes of one of its parts. Between the halves of a
    # split backward pass they live as without recomputation (layers/recompute.py).
    stored = plan.timeline.peaks[rank] * kept
    halves = plan.timeline.halves[rank] * max(0, whole - kept)
    activations = (stored + halves) / len(parts) / plan.context
    return int(activations), recomputed // plan.context


def _attention_bytes(model: ModelSpec, plan: StepPlan, scored_rows: int) -> int:
    """Return the bytes of a rank's two rows of keys and values, and of a row of their gradients.

    So much for a ring; ranks that exchange heads need less.
    """
    if plan.context == 1:
        return 0
    _, heads, width = model.attention_shape
    positions = max(plan.microbatch, scored_rows) * model.context // plan.context
    return 2 * positions * heads * width * (2 * plan.precision.element_bytes + FLOAT32_BYTES)


def _bucket_bytes(plan: StepPlan, replicas: Replicas, count: int) -> int:
    """Return the bytes of gradients in buckets; 0 where they stay where autograd put them."""
    precision = plan.precision
    several = replicas.ranks > 1
    if not (several or plan.fixed_order or precision.has_masters or flat_gradients(plan)):
        return 0
    nbytes = FLOAT32_BYTES * count
    wire = several and precision.reduce_dtype != "float32"
    summed = nbytes // 2 if wire else nbytes
    total = nbytes + summed if wire else nbytes
    if replicas.on_node > 1 and precision.device == "cpu":
        # Each rank adds up its share of the others' rows, in shared memory.
        total += summed * (replicas.on_node - 1) // replicas.on_node
    if plan.fixed_order:
        # The tree of sums, as a binary counter: a sum for each bit, and the one to be added.
        total += nbytes * plan.microbatches.bit_length()
    return total


def _stream_bytes(model: ModelSpec, plan: StepPlan, rank: int, scored_rows: int) -> int:
    """Return the bytes of streams that arrive at a rank of a pipeline or leave it."""
    schedule = plan.schedule
    width = model.stream_features * plan.precision.element_bytes // plan.context
    total = 0
    for sender, receiver in schedule.channels:
        ends = schedule.rank_of[sender], schedule.rank_of[receiver]
        if rank in ends:
            # Activations of an evaluation pass too, and a slot is as large as its largest message.
            rows = max(plan.microbatch, scored_rows if sender < receiver else 0)
            total += SLOTS * rows * width
            total += (POSTED if rank == ends[1] else 1) * plan.microbatch * width
    return total


def _scoring_bytes(model: ModelSpec, plan: StepPlan, rank: int, rows: int, ends: bool) -> int:
    """Return the bytes of a batch of an evaluation, with the streams that wait at the rank."""
    element, device = plan.precision.element_bytes, plan.precision.device
    logits = model.logits_bytes(rows, device) if ends and rows else 0
    rank_of = plan.schedule.rank_of
    forward = [(rank_of[a], rank_of[b]) for a, b in plan.schedule.channels if a < b]
    waiting = scored_ahead(plan.schedule.ranks) * any(sender == rank for sender, _ in forward)
    waiting += POSTED * any(receiver == rank for _, receiver in forward)
    stream = model.stream_features * element * rows
    scoring = model.scoring_bytes(rows, element) + logits + waiting * stream
    return scoring // plan.context
