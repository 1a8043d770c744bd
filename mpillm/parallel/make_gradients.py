"""Make the GradientSync of a rank's parts: replicated, in shards, or with experts of its own."""

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from torch import nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.models.part_module import PartModule
from mpillm.parallel.data.gradient_sync import GradientSync
from mpillm.parallel.data.replicated import ReplicatedGradients
from mpillm.parallel.data.zero import NeedsWhole, ShardStep, ZeroGradients, cuts_all
from mpillm.parallel.devices import own_device
from mpillm.parallel.expert.expert_gradients import ExpertGradients
from mpillm.parallel.expert.expert_parallel import ExpertParallel
from mpillm.parallel.precision import torch_dtype
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan, flat_gradients

if TYPE_CHECKING:
    from mpi4py import MPI


def make_gradients(
    parts: Sequence[PartModule],
    tokens: Axis,
    plan: StepPlan,
    settings: ParallelSettings,
    experts: ExpertParallel | None = None,
    *,
    comm: "MPI.Intracomm",
    replica: tuple[int, int] = (0, 1),
    profile: ClusterProfile | None = None,
    warn: Callable[[str], None] = silent,
    needs_whole: NeedsWhole = cuts_all,
) -> GradientSync:
    """Make what sums the gradients of `parts` over the ranks of `tokens`, those of experts over
    their owners.

    `replica`: (i, n), the rank is the i-th of n along the axes apart from `tokens` that hold the
    same weights. `comm`: of the mesh, whose ranks all call it.
    """
    dtype, reduce_dtype = map(torch_dtype, (plan.precision.dtype, plan.precision.reduce_dtype))
    owned: Container[nn.Parameter] = frozenset() if experts is None else experts

    def replicated(axis: Axis, of_experts: bool) -> GradientSync:
        weights = [[w for w in part.parameters() if (w in owned) == of_experts] for part in parts]
        return ReplicatedGradients(
            weights,
            axis,
            settings,
            profile,
            warn,
            fixed_order=plan.fixed_order,
            flat=flat_gradients(plan),
            reduce_dtype=reduce_dtype,
        )

    if settings.zero and tokens.size > 1:
        tied, nodes = parts[0].spec.tied_weights, tokens.node_map and tokens.node_map.node_of
        device = own_device(plan.precision.device)
        splits = any(action.kind in "IW" for row in plan.schedule.rows for action in row)
        dense: GradientSync = ZeroGradients(
            [
                {n: w for n, w in part.named_parameters() if w.requires_grad and w not in owned}
                for part in parts
            ],
            tokens,
            settings,
            ShardStep(dtype, reduce_dtype, plan.fixed_order, plan.microbatches > 1, splits, device),
            profile,
            warn,
            needs_whole=needs_whole,
            tied={*tied, *tied.values()},
            alike=len(set(comm.allgather(nodes))) == 1,
            blocks=[[block for _, block in part.numbered_blocks()] for part in parts],
        )
    else:
        dense = replicated(tokens, False)
    if experts is None:
        return dense
    # Of the ranks that hold the same dense weights, those of a group hold other experts.
    owners, (outer, outers) = experts.owners, replica
    own = outer * owners.size + owners.rank, outers * owners.size
    return ExpertGradients(dense, replicated(owners, True), experts, own)
