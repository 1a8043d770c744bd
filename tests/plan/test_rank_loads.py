"""The load of each rank of a layout: who shares gradients, what adds up to a node, what is sent."""

import pytest

from mpillm.machine.node_map import NodeMap
from mpillm.models.decoder import SHAPES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, mesh_order, plan_step, traffic_bytes
from mpillm.plan.gather_count import gathers_a_step
from mpillm.plan.held_memory import Replicas
from mpillm.plan.peak_memory import (
    CODE_BYTES,
    KINDS,
    PROCESS_BYTES,
    KindBytes,
    MemoryEstimate,
    rows_at_once,
)
from mpillm.plan.rank_loads import axis_traffic, load_nodes, load_ranks, placed_alike, replicas_of
from mpillm.train.optimizers.adamw import AdamWSettings

SMALL = SHAPES["small"].replace(vocab_size=2048)
BATCH = 16
AUTO, BY_MPI = ParallelSettings(), ParallelSettings(allreduce="mpi")


def on_nodes(nodes: int, each: int) -> NodeMap:
    return NodeMap(tuple(tuple(range(n * each, (n + 1) * each)) for n in range(nodes)))


def planned(pipeline: int, ranks: int) -> tuple[dict[str, int], StepPlan]:
    settings = ParallelSettings(pipeline=pipeline)
    sizes = mesh_order(settings, ranks, SMALL, BATCH)
    return sizes, plan_step(SMALL, settings, sizes["data"], BATCH)


def test_the_items_of_every_kind_add_up_to_the_total() -> None:
    counted = [item for items in KINDS.values() for item in items]
    estimate = MemoryEstimate(**{item: 2**number for number, item in enumerate(counted)})
    assert estimate.items.keys() == set(counted)
    assert sum(nbytes.rank for nbytes in estimate.by_kind.values()) == estimate.total
    assert KindBytes(2, 1) + KindBytes(3, 3) == KindBytes(5, 4)


@pytest.mark.parametrize(
    ("nodes", "each", "pipeline"), [(1, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (2, 4, 2)]
)
def test_a_node_holds_what_its_ranks_hold_and_shared_pages_once(
    nodes: int, each: int, pipeline: int
) -> None:
    sizes, plan = planned(pipeline, nodes * each)
    loads = load_ranks(SMALL, plan, AdamWSettings(), sizes, on_nodes(nodes, each), AUTO)
    assert [load.node for load in loads] == [rank // each for rank in range(nodes * each)]
    found = load_nodes(loads)
    assert len(found) == nodes
    for number, node in enumerate(found):
        own = [load for load in loads if load.node == number]
        held = sum(load.parameters for load in own)
        assert node.parameters == held
        assert node.kinds["weights"] == 4 * held
        assert node.kinds["optimizer"] == 8 * held
        if sizes["data"] > 1:
            # A row of gradients a rank, in pages that others read, too.
            assert node.kinds["gradients"] == pytest.approx(4 * held, abs=8)
        code = CODE_BYTES * (each - 1)
        most = sum(load.memory.by_kind["process"].rank for load in own)
        assert node.kinds["process"] == pytest.approx(most - code, abs=each)
        assert node.total == sum(node.kinds.values())
    # Over all ranks of a pipeline the parts are the model, with a tied weight in two of them.
    stages = {load.places["pipeline"]: load.parameters for load in loads}
    twice = 2048 * SMALL.width if pipeline > 1 else 0
    assert sum(stages.values()) == SMALL.parameters + twice
    assert loads[0].memory.process == PROCESS_BYTES


def test_ranks_that_share_gradients_are_those_of_the_data_axis_on_a_node() -> None:
    sizes = {"data": 4, "pipeline": 2}
    # Neighbours in rank order are stages: a node of 4 ranks has 2 of a data group.
    assert replicas_of(0, sizes, on_nodes(2, 4), AUTO) == Replicas(4, 2, 4, shards=4)
    assert replicas_of(0, sizes, on_nodes(2, 4), BY_MPI) == Replicas(4, 1, 4, shards=4)
    assert replicas_of(5, sizes, on_nodes(1, 8), AUTO) == Replicas(4, 4, 8, shards=4)
    assert replicas_of(5, sizes, on_nodes(8, 1), AUTO) == Replicas(4, 1, 1, shards=4)


def test_islands_keep_common_weights_and_sum_gradients_alone() -> None:
    settings = ParallelSettings(island=2)
    sizes = mesh_order(settings, 8, SMALL, BATCH)
    assert list(sizes) == ["island", "pipeline", "data"]
    # A node is an island: its ranks share rows with each other alone.
    assert replicas_of(3, sizes, on_nodes(2, 4), settings) == Replicas(
        4, 4, 4, shards=4, outer_bytes=8
    )
    plan = plan_step(SMALL, settings, 8, BATCH)
    with_islands, without = (
        load_ranks(SMALL, plan, AdamWSettings(), mesh, on_nodes(2, 4), settings)[0].memory
        for mesh in (sizes, {"pipeline": 1, "data": 8})
    )
    assert with_islands.optimizer == without.optimizer
    assert with_islands.islands == 8 * SMALL.parameters + min(4 * SMALL.parameters, 32 << 20)
    assert without.islands == 0
    found = axis_traffic(SMALL, plan, BATCH, sizes, on_nodes(2, 4), settings)
    assert found["island"].rank_bytes == pytest.approx(4 * SMALL.parameters / 30)
    assert (found["island"].nodes, found["data"].nodes) == (2, 1)


def test_messages_are_those_of_the_axes_and_leave_a_node_where_a_group_does() -> None:
    sizes, plan = planned(2, 8)
    found = axis_traffic(SMALL, plan, BATCH, sizes, on_nodes(2, 4), AUTO)
    assert list(found) == list(sizes)
    sent = traffic_bytes(sizes, SMALL, BATCH, plan.schedule.chunks, plan.precision)
    assert {axis: each.rank_bytes for axis, each in found.items()} == {
        axis: sent[axis] for axis in sizes
    }
    # The last axis is within a node, the first one between both.
    assert [found[axis].nodes for axis in sizes] == [2, 1]
    assert [sent[axis] for axis in sizes] == sorted(sent.values())
    alone = axis_traffic(SMALL, plan, BATCH, sizes, on_nodes(1, 8), AUTO)
    assert {each.nodes for each in alone.values()} == {1}


@pytest.mark.parametrize(("nodes", "each"), [(1, 2), (1, 8), (2, 4)])
def test_a_node_has_weights_once_and_its_shards_of_the_rest(nodes: int, each: int) -> None:
    ranks = nodes * each
    settings = ParallelSettings(zero=3)
    sizes = mesh_order(settings, ranks, SMALL, BATCH)
    plan = plan_step(SMALL, settings, sizes["data"], BATCH)
    loads = load_ranks(SMALL, plan, AdamWSettings(), sizes, on_nodes(nodes, each), settings)
    count = SMALL.parameters
    for node in load_nodes(loads):
        assert node.kinds["weights"] == pytest.approx(4 * count, abs=8)
        assert node.kinds["optimizer"] == pytest.approx(8 * count / nodes, abs=8 * each)
        # The shards, a unit's row of each rank, and a block for the next one.
        rows = each * (8 << 20) + (8 << 20) // nodes
        assert node.kinds["gradients"] == pytest.approx(4 * count / nodes + rows, abs=64 * each)
        assert node.parameters == pytest.approx(count, abs=each)


@pytest.mark.parametrize("nodes", [on_nodes(4, 1), NodeMap(((0, 1, 2), (3,)))])
def test_ranks_that_share_no_memory_gather_two_blocks_at_a_time(nodes: NodeMap) -> None:
    settings, sizes = ParallelSettings(zero=3), {"data": 4, "pipeline": 1}
    plan = plan_step(SMALL, settings, 4, BATCH)
    loads = load_ranks(SMALL, plan, AdamWSettings(), sizes, nodes, settings)
    outside, block = SMALL.block_parameters_of(SMALL.whole)
    assert outside + SMALL.layers * block == SMALL.parameters
    for load in loads:
        own = SMALL.parameters // 4
        assert load.memory.weights == 4 * (own + outside + 2 * block)
        assert load.memory.counted_elsewhere["weights"] == 0
    # The gradients once a microbatch, the values of layers forward and backward.
    sent = axis_traffic(SMALL, plan, BATCH, sizes, nodes, settings)["data"].rank_bytes
    times = plan.microbatches + gathers_a_step(SMALL, plan)
    expected = times * 4 * SMALL.parameters * 3 / 4
    assert sent == pytest.approx(expected)


def test_groups_that_are_placed_otherwise_share_no_weights() -> None:
    """The ranks of the first stage are on one node, those of the second on two."""
    settings, sizes = ParallelSettings(zero=3), {"pipeline": 2, "data": 4}
    nodes = NodeMap(((0, 1, 2, 3), (4, 5), (6, 7)))
    assert not placed_alike(sizes, nodes)
    for rank in (0, 4):
        assert replicas_of(rank, sizes, nodes, settings).on_node == 1
        assert replicas_of(rank, sizes, nodes, ParallelSettings()).on_node == (
            4 if rank == 0 else 2
        )
    assert placed_alike(sizes, on_nodes(2, 4))
    assert replicas_of(0, sizes, on_nodes(2, 4), settings).on_node == 4
    sizes, mixed = {"data": 4, "pipeline": 2}, NodeMap(((0, 1, 4, 5), (2, 3, 6, 7)))
    assert placed_alike(sizes, mixed)


def test_hybrid_shards_are_those_of_a_node() -> None:
    settings = ParallelSettings(zero=2, zero_on_node=True)
    assert replicas_of(0, {"data": 8}, on_nodes(2, 4), settings) == Replicas(8, 4, 4, 2, 4)
    assert replicas_of(0, {"data": 8}, on_nodes(8, 1), settings) == Replicas(8, 1, 1, 2, 8)
    assert replicas_of(0, {"data": 1}, on_nodes(1, 1), settings).zero == 0


@pytest.mark.parametrize("zero", [0, 3])
def test_experts_are_divided_and_everything_else_is_not(zero: int) -> None:
    model = SMALL.replace(experts=8, hidden=256)
    experts = model.expert_parameters_of(model.whole)
    dense = model.parameters - experts
    assert experts == model.layers * 8 * 3 * 256 * model.width
    sizes, plan = {"data": 4, "pipeline": 1}, plan_step(model, AUTO, 4, BATCH)
    found = {}
    for shared in (1, 2, 4):
        settings = ParallelSettings(experts=shared, zero=zero)
        found[shared] = load_ranks(model, plan, AdamWSettings(), sizes, on_nodes(2, 2), settings)[0]
    shards = 4 if zero else 1
    for shared in (2, 4):
        load = found[shared]
        assert load.parameters == dense + experts // shared
        assert load.memory.weights == 4 * load.parameters
        state = 8 * dense // shards + 8 * experts // shared
        assert load.memory.optimizer == pytest.approx(state, rel=1e-6)
        assert load.memory.gradients >= 4 * (dense // shards + experts // shared)
        rows = max(plan.microbatch, rows_at_once(model)) * model.context * 2
        assert load.memory.inboxes == int(2 * 1.25 * rows * 4 * model.width)
    assert found[1].memory.inboxes == 0
    assert found[1].parameters == model.parameters
    assert found[4].memory.total < found[2].memory.total


def test_tokens_cross_to_the_owners_and_back_twice() -> None:
    model = SMALL.replace(experts=8, hidden=256)
    sizes = {"data": 2, "pipeline": 1}
    plain = traffic_bytes(sizes, model, BATCH, 1)["data"]
    shared = traffic_bytes(sizes, model, BATCH, 1, settings=ParallelSettings(experts=2))["data"]
    rows = BATCH // 2 * model.context * 2 * model.layers
    # Half of the choices fall on the other rank; its experts' gradients are summed with no one's.
    tokens = 4 * rows * model.width * 4 / 2
    gradients = 4 * model.expert_parameters_of(model.whole)
    assert shared - plain == pytest.approx(tokens - gradients)
