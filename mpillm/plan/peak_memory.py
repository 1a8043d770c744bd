"""Predict the peak memory of a rank in training: pure functions over settings, for every planner.

On a CPU it is the peak resident set of the process, on a GPU the peak of torch's allocator. The
peak of a step is at the loss, or where a backward pass begins: the activations of all microbatches
in flight, and what one block or the loss needs above them. What persists is added: weights, state,
and on a CPU the process itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType

from mpillm.models.spec import ModelSpec, Part
from mpillm.parallel.context.context_traffic import own_heads
from mpillm.parallel.expert.expert_groups import INBOX_GROWTH
from mpillm.parallel.step_plan import StepPlan, scored_ahead
from mpillm.plan.held_memory import (
    ALONE,
    FLOAT32_BYTES,
    OptimizerCosts,
    Replicas,
    held_of,
    parameters_held,
)
from mpillm.plan.teacher_memory import teacher_bytes
from mpillm.system.console import binary_bytes

# The resident set of Python, torch's CPU build, MPI and h5py before a model is built (Open MPI 5,
# torch 2.13, x86-64: 268 to 277 MiB). A run measures its own.
PROCESS_BYTES = 272 << 20
# Of these, code that a node's processes map from one file (smaps: Shared_Clean).
CODE_BYTES = 96 << 20
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
# Of the buffer of islands: outer_step.MESSAGE_BYTES.
ISLAND_MESSAGE_BYTES = 32 << 20
# Tokens in a batch of an evaluation: enough to fill the matrix products, few enough for the logits
# of a large vocabulary.
SCORED_TOKENS = 4096


def rows_at_once(model: ModelSpec) -> int:
    """Return how many sequences a batch of an evaluation has."""
    return max(1, SCORED_TOKENS // max(model.context, model.source_context))


# Kind → the items of an estimate that belong to it.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "weights": ("weights", "masters"),
        "teacher": ("teacher",),
        "gradients": ("gradients",),
        "optimizer": ("optimizer", "islands"),
        "activations": ("activations", "recomputed", "outputs"),
        "buffers": ("streams", "attention", "inboxes", "data", "evaluation", "checkpoint", "gaps"),
        "process": ("process", "libraries"),
    }
)


@dataclass(frozen=True)
class KindBytes:
    """The bytes of one kind of memory. They add up by `+`."""

    rank: int = 0
    """In the resident set of the rank, shared pages included."""
    node: int = 0
    """Of these, what the rank adds to its node: pages that another rank counts are left out."""

    def __add__(self, other: "KindBytes") -> "KindBytes":
        return KindBytes(self.rank + other.rank, self.node + other.node)


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one rank at its peak, by what takes them. Their sum is the peak."""

    process: int = 0
    """Python, torch, MPI and h5py, before the model is built."""
    libraries: int = 0
    weights: int = 0
    masters: int = 0
    """Float32 copies of weights of a lower dtype."""
    teacher: int = 0
    """Frozen weights of the model that the run learns from, in the dtype that they have."""
    optimizer: int = 0
    islands: int = 0
    """Common weights, outer momentum and the buffer of a message."""
    gradients: int = 0
    """In buckets, or above what the activations leave to them when they are freed."""
    activations: int = 0
    """Kept for the backward pass, of all microbatches in flight."""
    recomputed: int = 0
    """The largest block in its backward pass, above the loss."""
    outputs: int = 0
    """A chunk of logits, and the gradients of hidden states and head."""
    streams: int = 0
    """Between the stages of a pipeline: queues, posted receives, a send. Between ranks of a tensor
    axis: gathered streams beyond the own part, and rows of sums.
    """
    attention: int = 0
    """Keys and values that the ranks of a context axis read of each other, and their gradients."""
    inboxes: int = 0
    """Of the tokens that ranks pass to the owners of experts."""
    data: int = 0
    evaluation: int = 0
    """Above a step."""
    checkpoint: int = 0
    gaps: int = 0
    """Free memory between arrays that the allocator cannot use."""
    counted_elsewhere: Mapping[str, int] = field(default_factory=dict)
    """Item → bytes of it in shared pages that another rank of the node counts: on a node, each page
    counts once.
    """

    @property
    def items(self) -> dict[str, int]:
        """Name → bytes, in order, of those that are not 0."""
        names = (each.name for each in fields(self) if each.name != "counted_elsewhere")
        named = {name: int(getattr(self, name)) for name in names}
        return {name: nbytes for name, nbytes in named.items() if nbytes}

    @cached_property
    def by_kind(self) -> dict[str, KindBytes]:
        """Each of KINDS → its bytes in the rank and on the node."""
        return {
            kind: sum((self._of_item(item) for item in items), KindBytes())
            for kind, items in KINDS.items()
        }

    def _of_item(self, item: str) -> KindBytes:
        nbytes = int(getattr(self, item))
        return KindBytes(nbytes, nbytes - self.counted_elsewhere.get(item, 0))

    @cached_property
    def total(self) -> int:
        return sum(self.items.values())

    @cached_property
    def on_node(self) -> int:
        """What the rank adds to its node: shared pages count once there."""
        return sum(kind.node for kind in self.by_kind.values())

    def describe(self) -> str:
        """Write the total, and the parts in MiB from the largest on."""
        mib = {name: round(nbytes / 2**20) for name, nbytes in self.items.items()}
        largest = sorted(mib, key=lambda name: -mib[name])
        parts = ", ".join(f"{name} {mib[name]:,}" for name in largest if mib[name])
        return f"about {binary_bytes(self.total)} ({parts} MiB)"


def predict_peak(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    replicas: Replicas = ALONE,
    process_bytes: int = PROCESS_BYTES,
    scored_rows: int = 1,
) -> MemoryEstimate:
    """Estimate the peak of the rank that needs most: see `predict_rank`."""
    every = [
        predict_rank(model, plan, optimizer, rank, replicas, process_bytes, scored_rows)
        for rank in range(plan.schedule.ranks)
    ]
    return max(every, key=lambda estimate: estimate.total)


def predict_rank(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    rank: int,
    replicas: Replicas = ALONE,
    process_bytes: int = PROCESS_BYTES,
    scored_rows: int = 1,
) -> MemoryEstimate:
    """Estimate the peak of rank number `rank` of a pipeline.

    `process_bytes`: of a process before it builds a model; a GPU's memory holds none of it.
    `scored_rows`: sequences at once in an evaluation; 0: there is none. Ranks that share a layer
    have equal parts of its activations: streams in shared memory count once.
    """
    base = _process(process_bytes) if plan.precision.device == "cpu" else MemoryEstimate()
    parts = [plan.parts[stage] for stage in plan.schedule.stages_of(rank)]
    precision, rows = plan.precision, plan.microbatch
    element, device = precision.element_bytes, precision.device
    tensor = replicas.tensor
    count = parameters_held(model, parts, replicas)
    ends = any(map(model.ends, parts))
    # Ranks of the context axis share the positions, those of the tensor axis each layer.
    shared = tensor * plan.context
    activations, recomputed = (n // tensor for n in _activations(model, plan, parts, rank))
    teacher = teacher_bytes(model, plan, replicas, ends)
    outputs = model.output_bytes(rows, device) // shared if ends else 0
    # Its forward pass comes between the student's and the loss.
    outputs = max(outputs + teacher.loss, teacher.forward)
    block = recomputed + model.working_bytes(rows, element) // shared
    step = activations + max(outputs, block)
    held = held_of(model, plan, optimizer, parts, replicas)
    gradients, kept_apart = held.gradients, bool(held.gradients)
    if not kept_apart:
        # Each gradient is allocated when activations of as many bytes or more are free.
        gradients = max(0, FLOAT32_BYTES * count - step)
    share, recomputed_share = (GAP_SHARE, RECOMPUTED_GAP_SHARE) if device == "cpu" else (0, 0)
    gaps = int(share * step + recomputed_share * recomputed)
    # The allocator returns a step's memory ahead of an evaluation (system/malloc.py), but not the
    # gradients, which stay until the next step.
    scoring = int((1 + share) * _scoring_bytes(model, plan, rank, scored_rows, ends) / tensor)
    loose = 0 if kept_apart else FLOAT32_BYTES * count - gradients
    evaluation = max(0, scoring + loose - step - gaps)
    gathered = _gathered_bytes(model, plan, parts, rank, replicas, scored_rows)
    elsewhere = {
        **held.counted_elsewhere,
        "teacher": teacher.counted_elsewhere,
        "streams": gathered.rank - gathered.node,
        "process": min(base.process, CODE_BYTES) * (replicas.neighbours - 1) // replicas.neighbours,
    }
    return replace(
        base,
        weights=held.weights,
        masters=held.masters,
        teacher=teacher.held,
        optimizer=held.optimizer,
        gradients=gradients,
        islands=_island_bytes(replicas, count),
        activations=activations,
        recomputed=max(0, block - outputs),
        outputs=outputs,
        streams=_stream_bytes(model, plan, rank, scored_rows) // tensor + gathered.rank,
        attention=_attention_bytes(model, plan, scored_rows, tensor),
        inboxes=_inbox_bytes(model, plan, scored_rows) if replicas.experts > 1 else 0,
        # Tokens as they are read, and as ids and targets.
        data=2 * TOKEN_BYTES * plan.rows * (model.context + 1),
        evaluation=evaluation,
        gaps=gaps,
        counted_elsewhere=elsewhere,
    )


def _island_bytes(replicas: Replicas, count: int) -> int:
    if not replicas.outer_bytes:
        return 0
    if replicas.zero:
        # Of what the optimizer steps on.
        count //= replicas.shards
    return replicas.outer_bytes * count + min(FLOAT32_BYTES * count, ISLAND_MESSAGE_BYTES)


def _process(nbytes: int) -> MemoryEstimate:
    return MemoryEstimate(process=nbytes, libraries=LIBRARY_BYTES, checkpoint=CHECKPOINT_BYTES)


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


def _attention_bytes(model: ModelSpec, plan: StepPlan, scored_rows: int, tensor: int) -> int:
    """Return the bytes of a rank's two rows of keys and values, and of a row of their gradients.

    So much for a ring; ranks that exchange heads need less.
    """
    if plan.context == 1:
        return 0
    _, heads, width = own_heads(model.attention_shape, tensor)
    positions = max(plan.microbatch, scored_rows) * model.context // plan.context
    return 2 * positions * heads * width * (2 * plan.precision.element_bytes + FLOAT32_BYTES)


def _inbox_bytes(model: ModelSpec, plan: StepPlan, scored_rows: int) -> int:
    """Return the bytes of a rank's two inboxes, where all experts get equally many tokens."""
    tokens = max(plan.microbatch, scored_rows) * model.context // plan.context
    row = max(model.stream_widths) * plan.precision.element_bytes
    return int(2 * INBOX_GROWTH * tokens * model.experts_per_token * row)


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


def _gathered_bytes(
    model: ModelSpec,
    plan: StepPlan,
    parts: list[Part],
    rank: int,
    replicas: Replicas,
    scored_rows: int,
) -> KindBytes:
    """Return the bytes of the streams of a tensor axis, above the own parts among the activations.

    Backward passes keep the two streams that each block gathers, an evaluation has two at once. In
    a host the ranks share them. For sums each rank then has two rows there, of a step and of an
    evaluation each, and reads its part of the others'. A node with fewer ranks than the axis shares
    none: each rank has whole streams of its own.
    """
    tensor = replicas.tensor
    if tensor == 1:
        return KindBytes()
    stream = model.stream_features * plan.precision.element_bytes // plan.context
    step, scored = plan.microbatch * stream, scored_rows * stream
    blocks = 1 if plan.recompute == "full" else sum(part.last - part.first for part in parts)
    kept = int(2 * blocks * step * plan.timeline.peaks[rank] / len(parts))
    others = (kept + 2 * scored) * (tensor - 1) // tensor
    if plan.precision.device != "cpu" or replicas.neighbours < tensor:
        return KindBytes(others, others)
    # A row of its own, and of each other row its part.
    rows = 2 * (step + scored)
    return KindBytes(others + rows + rows * (tensor - 1) // tensor, rows)


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
