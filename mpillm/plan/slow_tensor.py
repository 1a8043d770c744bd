"""What a tensor axis costs whose groups of ranks are on several hosts: without torch and MPI.

Every layer waits for its exchanges, so nothing is computed meanwhile.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from mpillm.errors import LayoutError
from mpillm.machine.cluster_profile import REMEDY, ClusterProfile
from mpillm.machine.node_map import NodeMap
from mpillm.models.spec import ModelSpec
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, mesh_order
from mpillm.parallel.tensor.tensor_axis import EXCHANGES_A_BLOCK, EXCHANGES_OF_ENDS
from mpillm.plan.rank_loads import AxisTraffic, most_nodes
from mpillm.system.console import binary_bytes, counted

# The stream's exchanges: one half of them are all-gathers, the other half reduce-scatters.
OPERATIONS = ("allgather", "reduce_scatter")


def exchanges_a_step(model: ModelSpec, plan: StepPlan, pipeline: int) -> float:
    """Count the collectives of a rank's tensor axis in a step, the mean over the stages."""
    return (EXCHANGES_A_BLOCK * model.blocks + EXCHANGES_OF_ENDS) * plan.microbatches / pipeline


def exchange_seconds(
    traffic: AxisTraffic, exchanges: float, profile: ClusterProfile, device: str = "cpu"
) -> float | None:
    """Predict the seconds a step of `exchanges` collectives of the axis between nodes.

    B: bytes that a rank sends in a step; n: ranks; e: exchanges. Each exchange is of a stream of
    b = B/e · n/(n − 1) bytes. A profile may have both collectives on as many ranks and nodes. It
    gives e/2 · (all-gather(b) + reduce-scatter(b)), each by its fastest algorithm. Else messages
    between two nodes count, n − 1 to an exchange as in a ring: latency · e · (n − 1) + B / rate.
    That takes the link of a node for one rank's alone: groups that share it need longer. Returns
    None where the profile has neither.
    """
    size = traffic.size
    stream = round(traffic.rank_bytes / exchanges * size / (size - 1))
    found = [
        [
            entry.cost.seconds(stream)
            for entry in profile.collectives
            if (entry.operation, entry.nodes, entry.ranks, entry.device)
            == (operation, traffic.nodes, size, device)
        ]
        for operation in OPERATIONS
    ]
    if all(found):
        return exchanges / len(OPERATIONS) * sum(map(min, found))
    for entry in profile.point_to_point:
        if entry.level == "network":
            rate = entry.cost.bytes_per_second or math.inf
            messages = exchanges * (size - 1)
            return entry.cost.latency_seconds * messages + traffic.rank_bytes / rate
    return None


def slow_tensor_text(
    model: ModelSpec,
    plan: StepPlan,
    batch: int,
    settings: ParallelSettings,
    node_map: NodeMap,
    traffic: Mapping[str, AxisTraffic],
    profile: ClusterProfile | None,
) -> str:
    """Return a warning where a group of the tensor axis is on several nodes; "" else.

    `traffic`: of the mesh's axes. `profile`: None where there is none; the bytes are named then.
    """
    tensor = traffic.get("tensor")
    if tensor is None or tensor.nodes == 1:
        return ""
    exchanges = exchanges_a_step(model, plan, settings.pipeline)
    seconds = profile and exchange_seconds(tensor, exchanges, profile, plan.precision.device)
    cost = f"{exchanges:,.0f} exchanges, together {binary_bytes(tensor.rank_bytes)} a rank"
    where = f"parallel.tensor = {tensor.size} is on {counted(tensor.nodes, 'host')}"
    remedy = within_hosts(model, batch, settings, node_map)
    if seconds is None:
        lack = "the profile has no messages between hosts" if profile else "there is no profile"
        return (
            f"{where}, and every layer waits for its messages: {cost}, in a step; {lack} that "
            f"says how many seconds they take ({REMEDY}); {remedy}"
        )
    return (
        f"{where}, and every layer waits for its messages: about {seconds:.3g} s a step by the "
        f"profile ({cost}); {remedy}"
    )


def within_hosts(
    model: ModelSpec, batch: int, settings: ParallelSettings, node_map: NodeMap
) -> str:
    """Name the largest tensor axis whose groups stay within hosts, and what takes its place."""
    each = min(map(len, node_map.nodes))
    text = f"take a tensor axis that divides the {counted(each, 'rank')} of a host"
    for tensor in range(settings.tensor - 1, 0, -1):
        if settings.tensor % tensor:
            continue
        more = settings.tensor // tensor
        data = settings.data if settings.data == "auto" else settings.data * more
        wanted = {
            "pipeline": replace(settings, tensor=tensor, pipeline=settings.pipeline * more),
            "data": replace(settings, tensor=tensor, data=data),
        }
        for axis, changed in wanted.items():
            try:
                sizes = mesh_order(changed, node_map.size, model, batch)
            except LayoutError:
                continue
            if tensor == 1 or most_nodes("tensor", sizes, node_map) == 1:
                return (
                    f"{text}, such as parallel.tensor={tensor} with parallel.{axis}={sizes[axis]}"
                )
    return f"{text}, and more pipeline or data ranks instead"
