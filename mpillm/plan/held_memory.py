"""Predict what persists on a rank between steps: weights, masters, state, gradients.

Pure functions over settings, without torch and MPI.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mpillm.models.spec import ModelSpec, Part
from mpillm.models.tuning import BASE_BITS
from mpillm.parallel.data.shard_layout import UNIT_BYTES
from mpillm.parallel.step_plan import ELEMENT_BYTES, StepPlan, flat_gradients

FLOAT32_BYTES = 4


class OptimizerCosts(Protocol):
    """The memory of an optimizer, as its settings give it."""

    def state_bytes(self, model: ModelSpec, part: Part) -> int: ...


@dataclass(frozen=True)
class Replicas:
    """The ranks that sum gradients with each other, and how many of them share a node."""

    ranks: int = 1
    on_node: int = 1
    """Ranks of the group on one node that share memory with each other."""
    neighbours: int = 1
    """Ranks of any kind on the node, which map the same code."""
    zero: int = 0
    """The stage of ZeRO: what the ranks share out."""
    shards: int = 1
    unit_bytes: int = UNIT_BYTES
    """Of the gradients that ZeRO sums at a time."""
    outer_bytes: int = 0
    """Bytes a parameter that islands keep: common weights and outer momentum."""
    tensor: int = 1
    """Ranks that share each layer: each holds about this part of its weights."""
    experts: int = 1
    """Ranks that share out the experts, each a part of them."""

    @property
    def owners(self) -> "Replicas":
        """The ranks that own the same experts: they sum the gradients of these alone."""
        ranks, on_node = self.ranks // self.experts, max(1, self.on_node // self.experts)
        return replace(self, ranks=ranks, on_node=on_node, zero=0, experts=1)


ALONE = Replicas()
"""A rank that sums gradients with no other."""


@dataclass(frozen=True)
class HeldBytes:
    """The bytes of a rank that persist between steps."""

    weights: int
    masters: int
    optimizer: int
    gradients: int
    """0 where they stay where autograd put them."""
    counted_elsewhere: Mapping[str, int] = field(default_factory=dict)
    """Item → bytes of it in shared pages that another rank of the node counts."""


def parameters_held(model: ModelSpec, parts: Sequence[Part], replicas: Replicas) -> int:
    """Count the parameters of `parts` that a rank holds."""
    dense, experts = _counts(model, parts, replicas)
    return dense + experts


def _counts(model: ModelSpec, parts: Sequence[Part], replicas: Replicas) -> tuple[int, int]:
    """Count a rank's parameters apart from those of experts that are shared out, and these."""
    whole = sum(map(model.parameters_of, parts))
    shared = sum(map(model.expert_parameters_of, parts)) if replicas.experts > 1 else 0
    return (whole - shared) // replicas.tensor, shared // replicas.experts


def held_of(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    parts: Sequence[Part],
    replicas: Replicas,
) -> HeldBytes:
    """Estimate what a rank holds of `parts`. Experts have the state of a parameter's average."""
    dense, experts = _counts(model, parts, replicas)
    state = sum(optimizer.state_bytes(model, part) for part in parts) // replicas.tensor
    whole = dense + experts * replicas.experts
    if plan.tuning.freezes:
        return _tuned(model, plan, parts, replicas, dense, state)
    held = _held_of(plan, replicas, dense, state * dense // max(1, whole))
    if gathers(plan, replicas):
        held = replace(held, weights=_gathered(model, plan, parts, replicas, dense))
    if not experts:
        return held
    own = _held_of(plan, replicas.owners, experts, state * experts // whole)
    return HeldBytes(
        held.weights + own.weights,
        held.masters + own.masters,
        held.optimizer + own.optimizer,
        held.gradients + (own.gradients or FLOAT32_BYTES * experts),
        {
            item: held.counted_elsewhere.get(item, 0) + own.counted_elsewhere.get(item, 0)
            for item in ("gradients", "weights")
        },
    )


def _tuned(
    model: ModelSpec,
    plan: StepPlan,
    parts: Sequence[Part],
    replicas: Replicas,
    count: int,
    state: int,
) -> HeldBytes:
    """Estimate what a rank holds where some weights are frozen: each node holds these once."""
    tuning, element = plan.tuning, plan.precision.element_bytes
    trained = sum(tuning.trained_of(model, part) for part in parts) // replicas.tensor
    held = _held_of(plan, replicas, trained, state * trained // max(1, count))
    frozen = count if tuning.adapter.used else count - trained
    nbytes = element * frozen
    if tuning.adapter.base != "float32":
        # Embeddings and heads are stored in the run's dtype.
        outside = sum(model.block_parameters_of(part)[0] for part in parts) // replicas.tensor
        in_blocks = max(0, frozen - outside)
        nbytes += int(in_blocks * (BASE_BITS[tuning.adapter.base] / 8 - element))
    shared = _shares(plan, replicas)
    pages = nbytes * (replicas.on_node - 1) // replicas.on_node if shared else 0
    elsewhere = dict(held.counted_elsewhere)
    elsewhere["weights"] = elsewhere.get("weights", 0) + pages
    return replace(held, weights=held.weights + nbytes, counted_elsewhere=elsewhere)


def _held_of(plan: StepPlan, replicas: Replicas, count: int, state: int) -> HeldBytes:
    """Estimate what a rank holds of `count` parameters that all its replicas have."""
    precision = plan.precision
    weights = precision.element_bytes * count
    masters = FLOAT32_BYTES * count if precision.has_masters else 0
    if replicas.zero:
        return _sharded(plan, replicas, count, (weights, masters, state))
    rows = _rows_of_others(plan, replicas, count)
    gradients = _bucket_bytes(plan, replicas, count)
    elsewhere = {"gradients": rows if gradients else 0}
    return HeldBytes(weights, masters, state, gradients, elsewhere)


def gathers(plan: StepPlan, replicas: Replicas) -> bool:
    """Return whether the weights are gathered layer by layer: ranks share no memory for them."""
    return replicas.zero == 3 and not _shares(plan, replicas)


def _shares(plan: StepPlan, replicas: Replicas) -> bool:
    return replicas.on_node > 1 and plan.precision.device == "cpu"


def _gathered(
    model: ModelSpec, plan: StepPlan, parts: Sequence[Part], replicas: Replicas, count: int
) -> int:
    """Return the bytes of weights within a pass: the own shard of `count`, those outside of blocks,
    a block that is read, and one that arrives.
    """
    found = [model.block_parameters_of(part) for part in parts]
    outside, block = sum(own for own, _ in found), max(block for _, block in found)
    if replicas.experts > 1:
        block -= max(model.expert_parameters_of(Part(p.first, p.first + 1)) for p in parts)
    # Without blocks the values arrive piece by piece.
    arriving = block or min(outside, UNIT_BYTES // FLOAT32_BYTES)
    at_once = (outside + block + arriving) // replicas.tensor
    return plan.precision.element_bytes * (count // replicas.shards + at_once)


def _sharded(
    plan: StepPlan, replicas: Replicas, count: int, whole: tuple[int, int, int]
) -> HeldBytes:
    """Estimate what ZeRO leaves on a rank of (weights, masters, state)."""
    weights, masters, state = whole
    shards = replicas.shards
    # A unit's gradients of this rank, and the blocks that it sums of the others' rows.
    row = min(replicas.unit_bytes, FLOAT32_BYTES * count)
    on_host = plan.precision.device == "cpu"
    others = row * (replicas.on_node - 1) // replicas.on_node if on_host else 0
    # The own sums, and the block in which the next microbatch's arrives.
    gradients = FLOAT32_BYTES * count // shards + row // shards + row + others
    if plan.fixed_order:
        gradients += FLOAT32_BYTES * count * plan.microbatches.bit_length()
    elif replicas.zero == 1:
        gradients += FLOAT32_BYTES * count
    once = replicas.zero == 3 and _shares(plan, replicas)
    pages = weights * (replicas.on_node - 1) // replicas.on_node if once else 0
    return HeldBytes(
        weights,
        masters // shards,
        state // shards,
        gradients,
        {"gradients": others, "weights": pages},
    )


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
    total += _rows_of_others(plan, replicas, count)
    if plan.fixed_order:
        # The tree of sums, as a binary counter: a sum for each bit, and the one to be added.
        total += nbytes * plan.microbatches.bit_length()
    return total


def _rows_of_others(plan: StepPlan, replicas: Replicas, count: int) -> int:
    """Return the bytes of other ranks' gradients that a rank reads in shared memory."""
    if replicas.on_node == 1 or plan.precision.device != "cpu":
        return 0
    # Each rank adds up its share of the others' rows.
    summed = ELEMENT_BYTES[plan.precision.reduce_dtype] * count
    return summed * (replicas.on_node - 1) // replicas.on_node
