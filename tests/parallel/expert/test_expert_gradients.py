"""Gradients of dense weights and of experts in one GradientSync: sums, norm and scale."""

import math

import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpillm.comm.mesh import Axis, Mesh
from mpillm.parallel.data.replicated import ReplicatedGradients
from mpillm.parallel.data.zero import ZeroGradients
from mpillm.parallel.expert.expert_gradients import ExpertGradients
from mpillm.parallel.grad_norm import clip_gradients_
from mpillm.parallel.settings import ParallelSettings

SETTINGS = ParallelSettings(zero=2)


def groups(comm: MPI.Intracomm) -> list[int]:
    """List how many ranks may own different experts."""
    return [size for size in (1, 2, 3, 4) if comm.size % size == 0]


@pytest.mark.parametrize("zero", [False, True])
def test_each_weight_is_summed_over_its_ranks_and_counts_once(
    comm: MPI.Intracomm, zero: bool
) -> None:
    if zero and comm.size == 1:
        pytest.skip("one rank has nothing to share out")
    mesh = Mesh(comm, {"data": comm.size})
    axis = mesh.axis("data")
    for size in groups(comm):
        group, place = divmod(comm.rank, size)
        of_owners = comm.Split(place, group)
        owners = Axis("owners", comm.size // size, group, of_owners)
        dense, expert = nn.Parameter(torch.ones(64, 50)), nn.Parameter(torch.ones(7, 3))
        named = {"dense": dense, "expert": expert}
        one = (
            ZeroGradients([{"dense": dense}], axis, SETTINGS)
            if zero
            else ReplicatedGradients([[dense]], axis, SETTINGS)
        )
        other = ReplicatedGradients([[expert]], owners, SETTINGS)
        sync = ExpertGradients(one, other, {expert}, (owners.rank, owners.size))
        assert list(sync.optimizer_weights(named)) == list(named)
        assert sync.is_cut == zero
        sync.begin()
        sync.last_microbatch()
        ((comm.rank + 1) * dense.sum() + (10 + comm.rank) * expert.sum()).backward()
        sync.microbatch_ended(0)
        sync.finish()
        total = sum(rank + 1 for rank in range(comm.size))
        own = sum(10 + rank for rank in range(place, comm.size, size))
        assert torch.equal(sync.gradient_of(expert), torch.full((7, 3), float(own)))
        assert (sync.gradient_of(dense) == total).all()
        # The whole model: one dense weight, and an expert of each rank of a group.
        experts = [sum(10 + r for r in range(p, comm.size, size)) for p in range(size)]
        square = 3200 * total**2 + 21 * sum(each**2 for each in experts)
        replica = (0, 1) if zero else (comm.rank, comm.size)
        norm = clip_gradients_(sync, comm, replica, math.sqrt(square) / 2)
        assert norm == pytest.approx(math.sqrt(square), rel=1e-6)
        assert torch.allclose(sync.gradient_of(expert), torch.full((7, 3), own / 2))
        assert torch.allclose(sync.gradient_of(dense), torch.tensor(total / 2))
        sync.clamp_(1.0)
        assert float(sync.gradient_of(expert).max()) == 1.0
        sync.updated()
        sync.close()
        of_owners.Free()
    mesh.free()
