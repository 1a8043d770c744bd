"""Mixtures whose experts are shared out, compared with the whole mixture on one process."""

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpillm.comm.mesh import Mesh
from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.mixture import Mixture
from mpillm.models.layers.recompute import recomputed
from mpillm.models.part_module import build_without_values, create, initialise
from mpillm.parallel.expert.expert_parallel import ExpertParallel

SIZES: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40, "context": 12}
SPECS: dict[str, Any] = {
    "top 2": {"hidden": 24, "experts": 12},
    "shared": {"hidden": 8, "experts": 12, "shared_hidden": 16, "shared_gate": True},
    "top 1, balanced": {"hidden": 8, "experts": 12, "experts_per_token": 1, "balance_loss": 0.1},
    "few": {"hidden": 16, "experts_per_token": 3},
}


def groups(comm: MPI.Intracomm) -> list[int]:
    """List the sizes of groups among the ranks."""
    return [size for size in range(2, comm.size + 1) if comm.size % size == 0] or [1]


def gradients(module: Mixture, x_BTC: Tensor, out_BTC: Tensor, recompute: bool) -> list[Any]:
    """Return output, gradient of the input, and gradients of all weights by name."""
    x_BTC = x_BTC.clone().requires_grad_()
    y_BTC, balance = recomputed(module, x_BTC) if recompute else module(x_BTC)
    total = (y_BTC * out_BTC).sum()
    (total if balance is None else total + 0.1 * balance).backward()
    weights = {name: weight.grad for name, weight in module.named_parameters()}
    return [y_BTC.detach(), x_BTC.grad, weights]


def close(one: Tensor, other: Tensor) -> bool:
    scale = max(float(other.abs().max()), 1e-3)
    return bool((one - other).abs().max() <= 1e-5 * scale)


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("recompute", [False, True])
def test_it_equals_the_whole_mixture(comm: MPI.Intracomm, case: str, recompute: bool) -> None:
    """Each rank has another number of positions, and one of them a single one."""
    given = {"experts": max(4, 2 * comm.size), **SPECS[case]}
    spec = DecoderConfig(**SIZES, **given)
    whole = create(spec, 5)
    mesh = Mesh(comm, {"data": comm.size})
    for size in groups(comm):
        shared = ExpertParallel(mesh.axis("data"), size, spec.experts)
        part = build_without_values(spec)
        shared.cut(part)
        initialise(part, 5)
        own, all_of_it = (m.layers["0"].feed_forward for m in (part, whole))
        assert len(own.experts) == spec.experts // size
        for trial in range(2):
            draw = np.random.default_rng(trial)
            lengths = draw.integers(1, 9, comm.size)
            lengths[trial % comm.size] = 1
            torch.manual_seed(trial)
            x = [torch.randn(2, int(length), spec.width) for length in lengths]
            out = [torch.randn_like(each) for each in x]
            whole.zero_grad()
            part.zero_grad()
            # On one process the gradients of all ranks add up.
            expected = [gradients(all_of_it, *each, recompute) for each in zip(x, out, strict=True)]
            found = gradients(own, x[comm.rank], out[comm.rank], recompute)
            assert close(found[0], expected[comm.rank][0])
            assert close(found[1], expected[comm.rank][1])
            check_weights(comm, shared, found[2], expected[-1][2])
        shared.close()
    mesh.free()


def check_weights(
    comm: MPI.Intracomm, shared: ExpertParallel, own: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Compare the sums of gradients: of experts over their owners, of others over all ranks."""
    for name, gradient in own.items():
        assert gradient is not None, name
        summed = gradient.clone()
        ranks = shared.owners.comm if name.startswith("experts.") else comm
        ranks.Allreduce(MPI.IN_PLACE, summed.numpy())
        assert close(summed, expected[name]), name


def test_names_are_those_of_the_whole_model_and_cover_it(comm: MPI.Intracomm) -> None:
    spec = DecoderConfig(**SIZES, hidden=8, experts=2 * comm.size)
    mesh = Mesh(comm, {"data": comm.size})
    shared = ExpertParallel(mesh.axis("data"), comm.size, spec.experts)
    part = build_without_values(spec)
    shared.cut(part)
    initialise(part, 5)
    values = dict(create(spec, 5).named_weights())
    held = dict(part.named_weights())
    for name, weight in held.items():
        assert torch.equal(weight, values[name]), name
        assert (weight in shared) == (".experts." in name)
    every = comm.allgather(sorted(held))
    assert set().union(*every) == set(values)
    counted = [name for names in every for name in names if ".experts." in name]
    assert len(counted) == len(set(counted))
    assert sum(weight.numel() for _, weight in shared.weights_of(part)) * comm.size == (
        spec.expert_parameters_of(spec.whole)
    )
    shared.close()
    mesh.free()


def test_no_position_is_dropped_where_all_choose_one_expert(comm: MPI.Intracomm) -> None:
    spec = DecoderConfig(**SIZES, hidden=8, experts=2 * comm.size, experts_per_token=1)
    mesh = Mesh(comm, {"data": comm.size})
    shared = ExpertParallel(mesh.axis("data"), comm.size, spec.experts)
    part, whole = build_without_values(spec), create(spec, 5)
    shared.cut(part)
    initialise(part, 5)
    with torch.no_grad():
        for model in (part, whole):
            # Positive inputs: the last expert has the largest share of each.
            model.layers["0"].feed_forward.router.weight.zero_()[-1] = 1.0
        x_BTC = torch.rand(3, 7 + comm.rank, spec.width) + 0.1
        y_BTC, _ = part.layers["0"].feed_forward(x_BTC)
        expected, _ = whole.layers["0"].feed_forward(x_BTC)
    assert (y_BTC.abs().sum(-1) > 0).all()
    assert close(y_BTC, expected)
    shared.close()
    mesh.free()
