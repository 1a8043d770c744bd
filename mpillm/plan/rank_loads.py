"""Predict what each rank of a layout holds and sends: pure functions, without torch and MPI."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpillm.comm.mesh import coordinates, ranks_along
from mpillm.machine.node_map import NodeMap
from mpillm.models.spec import ModelSpec, Part
from mpillm.parallel.axis_sizes import token_axes
from mpillm.parallel.data.shard_layout import UNIT_BYTES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, traffic_bytes
from mpillm.plan.gather_count import gathers_a_step
from mpillm.plan.held_memory import (
    FLOAT32_BYTES,
    OptimizerCosts,
    Replicas,
    gathers,
    parameters_held,
)
from mpillm.plan.peak_memory import (
    KINDS,
    PROCESS_BYTES,
    MemoryEstimate,
    predict_rank,
    rows_at_once,
)

# Ways of all-reduce with which a node's ranks have their gradients in shared memory.
SHARING = ("auto", "shared", "two-level")


@dataclass(frozen=True)
class RankLoad:
    """What one rank holds."""

    rank: int
    node: int
    """The number of its node, from 0."""
    places: Mapping[str, int]
    """Axis → its coordinate."""
    parts: tuple[Part, ...]
    """Of the model, a stage each."""
    parameters: int
    memory: MemoryEstimate

    @property
    def node_parameters(self) -> int:
        """The parameters that the rank adds to its node: those in shared pages count once there."""
        weights = self.memory.by_kind["weights"]
        return self.parameters * weights.node // max(1, weights.rank)


@dataclass(frozen=True)
class NodeLoad:
    """What the ranks of a node hold together."""

    parameters: int
    kinds: Mapping[str, int]
    """Kind of memory → bytes: a page that ranks share counts once."""

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class AxisTraffic:
    """The messages along one axis in a step."""

    size: int
    rank_bytes: float
    """That a rank sends."""
    nodes: int
    """The most nodes that a group of ranks along the axis is on: 1, no message leaves a node."""


def placed_alike(sizes: Mapping[str, int], node_map: NodeMap) -> bool:
    """Return whether all groups of ranks that sum gradients are on nodes in the same way.

    Else no ranks share memory for weights (`parallel.data.shard_group`).
    """
    along = token_axes(sizes)
    firsts: dict[tuple[int, ...], dict[str, int]] = {}
    for rank in range(node_map.size):
        places = coordinates(rank, sizes)
        others = tuple(place for axis, place in places.items() if axis not in along)
        firsts.setdefault(others, places)
    groups = (ranks_along(places, sizes, along) for places in firsts.values())
    return len({node_map.of_ranks(group).node_of for group in groups}) == 1


def replicas_of(
    rank: int,
    sizes: Mapping[str, int],
    node_map: NodeMap,
    settings: ParallelSettings,
    alike: bool | None = None,
) -> Replicas:
    """Return which ranks sum gradients with `rank`, of a mesh of `sizes`, and what islands keep.

    `alike`: what `placed_alike` returns, for `zero` alone; None asks it.
    """
    if alike is None:
        alike = not settings.zero or placed_alike(sizes, node_map)
    along = token_axes(sizes)
    group = ranks_along(coordinates(rank, sizes), sizes, along) if along else [rank]
    own_map = node_map.of_ranks(group)
    zero = settings.zero if len(group) > 1 else 0
    # Shards need as many ranks on each node, rows of all-reduces do not.
    able = own_map.even and alike if zero else settings.allreduce in SHARING
    shares = able and len(group) > len(own_map.nodes)
    on_node = max(map(len, own_map.nodes)) if shares else 1
    outer = FLOAT32_BYTES * (1 + (settings.island_momentum > 0)) if "island" in sizes else 0
    return Replicas(
        len(group),
        on_node,
        max(map(len, node_map.nodes)),
        zero,
        on_node if settings.zero_on_node and shares else len(group),
        settings.bucket_bytes or UNIT_BYTES,
        outer,
        sizes.get("tensor", 1),
        settings.experts,
    )


def load_ranks(
    model: ModelSpec,
    plan: StepPlan,
    optimizer: OptimizerCosts,
    sizes: Mapping[str, int],
    node_map: NodeMap,
    settings: ParallelSettings,
    process_bytes: int = PROCESS_BYTES,
) -> list[RankLoad]:
    """Predict the load of each rank of a mesh of `sizes`, whose ranks are ordered by node.

    `process_bytes`: of a process before it builds a model.
    """
    stages: dict[int, tuple[tuple[Part, ...], int]] = {}
    for stage in range(plan.schedule.ranks):
        parts = tuple(plan.parts[number] for number in plan.schedule.stages_of(stage))
        shared = Replicas(tensor=sizes.get("tensor", 1), experts=settings.experts)
        stages[stage] = parts, parameters_held(model, parts, shared)
    replicas: dict[tuple[int, ...], Replicas] = {}
    estimates: dict[tuple[int, Replicas], MemoryEstimate] = {}
    along = token_axes(sizes)
    alike = not settings.zero or placed_alike(sizes, node_map)
    loads = []
    for rank in range(node_map.size):
        places = coordinates(rank, sizes)
        stage = places.get("pipeline", 0)
        # Ranks that sum their gradients together have the same replicas, ranks of one stage with
        # the same replicas the same memory: a large mesh repeats few of them.
        group = tuple(place for axis, place in places.items() if axis not in along)
        if group not in replicas:
            replicas[group] = replicas_of(rank, sizes, node_map, settings, alike)
        key = stage, replicas[group]
        if key not in estimates:
            estimates[key] = predict_rank(
                model, plan, optimizer, stage, key[1], process_bytes, rows_at_once(model)
            )
        loads.append(RankLoad(rank, node_map.node_of[rank], places, *stages[stage], estimates[key]))
    return loads


def load_nodes(loads: Iterable[RankLoad]) -> list[NodeLoad]:
    """Add up the loads of the ranks of each node."""
    by_node: dict[int, list[RankLoad]] = {}
    for load in loads:
        by_node.setdefault(load.node, []).append(load)
    return [
        NodeLoad(
            sum(load.node_parameters for load in by_node[node]),
            {kind: sum(load.memory.by_kind[kind].node for load in by_node[node]) for kind in KINDS},
        )
        for node in sorted(by_node)
    ]


def axis_traffic(
    model: ModelSpec,
    plan: StepPlan,
    batch: int,
    sizes: Mapping[str, int],
    node_map: NodeMap,
    settings: ParallelSettings,
) -> dict[str, AxisTraffic]:
    """Return the messages along each axis of a mesh of `sizes`, in its order."""
    replicas = replicas_of(0, sizes, node_map, settings)
    sent = traffic_bytes(
        dict(sizes),
        model,
        batch,
        plan.schedule.chunks,
        plan.precision,
        settings,
        plan.microbatches,
        gathers_a_step(model, plan) if gathers(plan, replicas) else 0.0,
        plan.tuning,
    )
    return {
        name: AxisTraffic(size, sent[name], most_nodes(name, sizes, node_map))
        for name, size in sizes.items()
    }


def most_nodes(axis: str, sizes: Mapping[str, int], node_map: NodeMap) -> int:
    """Return the most nodes that ranks which differ along `axis` alone are on."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for rank, node in enumerate(node_map.node_of):
        others = tuple(place for name, place in coordinates(rank, sizes).items() if name != axis)
        groups.setdefault(others, set()).add(node)
    return max(map(len, groups.values()))
