"""A tensor axis on several hosts: the seconds of its messages by the profile, and the way out."""

from dataclasses import replace

import pytest

from mpillm.machine.cluster_profile import (
    Cluster,
    ClusterProfile,
    CollectiveCost,
    Cost,
    PointToPointCost,
)
from mpillm.machine.node_map import NodeMap
from mpillm.models.decoder import SHAPES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, mesh_order, plan_step
from mpillm.plan.rank_loads import AxisTraffic, axis_traffic
from mpillm.plan.slow_tensor import exchange_seconds, exchanges_a_step, slow_tensor_text
from mpillm.system.console import binary_bytes

SMALL = SHAPES["small"].replace(vocab_size=2048)
BATCH = 12
CLUSTER = Cluster("Made Up 9000", 64, "Open MPI", "5.0.9", 2, 2)
NETWORK = PointToPointCost("network", Cost((), 2e-5, 1e8, 0.1))
NODE = PointToPointCost("node", Cost((), 1e-6, 1e10, 0.1))
PROFILE = ClusterProfile("2026-11-30", CLUSTER, point_to_point=(NODE, NETWORK))


def on_nodes(nodes: int, each: int) -> NodeMap:
    return NodeMap(tuple(tuple(range(n * each, (n + 1) * each)) for n in range(nodes)))


def planned(
    settings: ParallelSettings, node_map: NodeMap
) -> tuple[StepPlan, dict[str, AxisTraffic]]:
    sizes = mesh_order(settings, node_map.size, SMALL, BATCH)
    plan = plan_step(SMALL, settings, sizes["data"], BATCH)
    return plan, axis_traffic(SMALL, plan, BATCH, sizes, node_map, settings)


def warned(
    settings: ParallelSettings, node_map: NodeMap, profile: ClusterProfile | None = None
) -> str:
    plan, traffic = planned(settings, node_map)
    return slow_tensor_text(SMALL, plan, BATCH, settings, node_map, traffic, profile)


def test_an_axis_within_hosts_is_no_warning() -> None:
    assert warned(ParallelSettings(tensor=2), on_nodes(2, 2)) == ""
    assert warned(ParallelSettings(), on_nodes(2, 2)) == ""
    assert warned(ParallelSettings(tensor=4), on_nodes(2, 2)) != ""
    # Where groups do not end with a host, one of them is on two.
    assert warned(ParallelSettings(tensor=2), on_nodes(2, 3)) != ""


def test_the_seconds_are_latencies_and_bytes_of_the_network() -> None:
    plan, traffic = planned(ParallelSettings(tensor=4), on_nodes(2, 2))
    tensor = traffic["tensor"]
    exchanges = exchanges_a_step(SMALL, plan, 1)
    assert exchanges == 8 * SMALL.blocks + 4
    # A stream in float32, of which a rank sends three quarters in each exchange.
    stream = 4 * BATCH * SMALL.context * SMALL.width
    assert tensor.rank_bytes == pytest.approx(exchanges * stream * 3 / 4)
    expected = 2e-5 * exchanges * 3 + tensor.rank_bytes / 1e8
    assert exchange_seconds(tensor, exchanges, PROFILE) == pytest.approx(expected)
    text = warned(ParallelSettings(tensor=4), on_nodes(2, 2), PROFILE)
    assert f"{exchanges:,.0f} exchanges, together {binary_bytes(tensor.rank_bytes)} a rank" in text
    assert f"about {expected:.3g} s a step by the profile" in text
    # Time that does not grow with the bytes has no rate.
    flat = replace(NETWORK, cost=replace(NETWORK.cost, bytes_per_second=None))
    found = exchange_seconds(tensor, exchanges, replace(PROFILE, point_to_point=(flat,)))
    assert found == pytest.approx(2e-5 * exchanges * 3)


def test_collectives_that_were_measured_between_the_nodes_come_first() -> None:
    plan, traffic = planned(ParallelSettings(tensor=4), on_nodes(2, 2))
    tensor, exchanges = traffic["tensor"], exchanges_a_step(SMALL, plan, 1)

    def entry(operation: str, seconds: float, ranks: int = 4) -> CollectiveCost:
        cost = Cost((), seconds, None, 0.1)
        return CollectiveCost(operation, "ring", "float32", "cpu", 2, ranks, 2, False, cost)

    entries = [
        entry("allgather", 0.5),
        entry("allgather", 0.25),
        entry("reduce_scatter", 1.0),
        entry("reduce_scatter", 0.001, ranks=8),
    ]
    profile = replace(PROFILE, collectives=tuple(entries))
    assert exchange_seconds(tensor, exchanges, profile) == pytest.approx(exchanges / 2 * 1.25)
    # One of the two alone says too little.
    profile = replace(PROFILE, collectives=tuple(entries[:2]))
    assert exchange_seconds(tensor, exchanges, profile) == exchange_seconds(
        tensor, exchanges, PROFILE
    )


def test_microbatches_and_stages_count() -> None:
    settings = ParallelSettings(tensor=2, pipeline=2)
    node_map = NodeMap(((0,), (1,), (2,), (3,)))
    plan, _ = planned(settings, node_map)
    assert plan.microbatches == 12
    assert exchanges_a_step(SMALL, plan, 2) == (8 * SMALL.blocks + 4) * 12 / 2


@pytest.mark.parametrize("profile", [None, replace(PROFILE, point_to_point=(NODE,))])
def test_without_figures_the_bytes_are_named_and_how_to_get_the_seconds(
    profile: ClusterProfile | None,
) -> None:
    text = warned(ParallelSettings(tensor=4), on_nodes(2, 2), profile)
    assert "parallel.tensor = 4 is on 2 hosts" in text
    assert "MiB a rank" in text
    assert "mpillm bench all --save" in text
    assert (profile is None) == ("there is no profile" in text)


@pytest.mark.parametrize(
    ("settings", "node_map", "way"),
    [
        (
            ParallelSettings(tensor=4),
            on_nodes(2, 2),
            "parallel.tensor=2 with parallel.pipeline=2",
        ),
        (
            # More stages than layers: the batch is shared instead.
            ParallelSettings(tensor=2, pipeline=SMALL.blocks, data=1),
            on_nodes(2 * SMALL.blocks, 1),
            "parallel.tensor=1 with parallel.data=2",
        ),
    ],
)
def test_the_way_out_is_a_layout_that_can_be(
    settings: ParallelSettings, node_map: NodeMap, way: str
) -> None:
    text = warned(settings, node_map)
    assert way in text
    words = way.replace("parallel.", "").split(" with ")
    sizes = {name: int(size) for name, size in (word.split("=") for word in words)}
    changed = replace(settings, **sizes)
    assert slow_tensor_text(SMALL, *_rest(changed, node_map)) == ""


def _rest(
    settings: ParallelSettings, node_map: NodeMap
) -> tuple[StepPlan, int, ParallelSettings, NodeMap, dict[str, AxisTraffic], None]:
    plan, traffic = planned(settings, node_map)
    return plan, BATCH, settings, node_map, traffic, None
