"""The outer step on weights that differ by island, compared with plain sums of one process."""

from collections.abc import Iterator

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from mpillm.comm.algorithms.trees import tree_split
from mpillm.comm.mesh import Mesh
from mpillm.errors import CommError
from mpillm.parallel.islands import outer_step
from mpillm.parallel.islands.outer_step import OuterStep
from mpillm.parallel.settings import ParallelSettings

SHAPES = {"a.weight": (3, 5), "b.bias": (7,), "c.weight": (40, 30)}


def weights_of(rank: int, seed: int = 0) -> dict[str, Tensor]:
    """Make the weights of an island: those of all islands are near each other."""
    common = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(1000 * seed + rank + 1)
    return {
        name: torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)
        for name, shape in SHAPES.items()
    }


def tree_sum(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    middle = tree_split(0, len(parts))
    return tree_sum(parts[:middle]) + tree_sum(parts[middle:])


def mean(size: int, seed: int = 0) -> dict[str, Tensor]:
    every = [weights_of(rank, seed) for rank in range(size)]
    return {name: tree_sum([each[name] for each in every]) / size for name in SHAPES}


@pytest.fixture(params=[1 << 10, 32 << 20], ids=["several messages", "one message"])
def mesh(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Mesh]:
    monkeypatch.setattr(outer_step, "MESSAGE_BYTES", request.param)
    made = Mesh(comm, {"island": comm.size})
    yield made
    made.free()


def begun(mesh: Mesh, **settings: object) -> tuple[OuterStep, dict[str, nn.Parameter]]:
    """Begin a round with the weights of island 0 on all islands."""
    weights = {name: nn.Parameter(each) for name, each in weights_of(0, 9).items()}
    outer = OuterStep(weights, mesh.axis("island"), ParallelSettings(**settings))  # type: ignore[arg-type]
    outer.begin()
    return outer, weights


@torch.no_grad()
def move(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def test_rate_1_without_momentum_is_the_average_bit_for_bit(mesh: Mesh) -> None:
    outer, weights = begun(mesh, island_rate=1.0, island_momentum=0.0)
    for seed in (1, 2):
        move(weights, weights_of(mesh.comm.rank, seed))
        outer.close_round()
        expected = mean(mesh.comm.size, seed)
        for name, weight in weights.items():
            assert torch.equal(weight.detach(), expected[name])
            assert torch.equal(outer.common[name], expected[name])
    assert outer.momentum == {}
    outer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nesterov_on_the_mean_difference(mesh: Mesh, dtype: str) -> None:
    outer, weights = begun(mesh, island_rate=0.7, island_momentum=0.5, island_dtype=dtype)
    common = {name: weight.detach().double() for name, weight in weights.items()}
    sums = {name: torch.zeros_like(each) for name, each in common.items()}
    # A difference loses what bfloat16 cannot hold: 1 in 256 of it.
    bound = 1e-6 if dtype == "float32" else 0.03
    for seed in (9, 10, 11):
        move(weights, weights_of(mesh.comm.rank, seed))
        outer.close_round()
        average = mean(mesh.comm.size, seed)
        for name, weight in weights.items():
            difference = common[name] - average[name].double()
            sums[name] = 0.5 * sums[name] + difference
            common[name] -= 0.7 * (difference + 0.5 * sums[name])
            assert torch.allclose(weight.double(), common[name], atol=bound, rtol=bound)
    outer.check_common()
    every = mesh.comm.allgather([weight.detach().numpy().tobytes() for weight in weights.values()])
    assert all(each == every[0] for each in every)
    outer.close()


def test_gradients_are_summed_before_the_first_round(mesh: Mesh) -> None:
    outer, _ = begun(mesh)
    own = weights_of(mesh.comm.rank, 3)
    outer.sum_gradients(list(own.values()))
    every = [weights_of(rank, 3) for rank in range(mesh.comm.size)]
    for name, gradient in own.items():
        assert torch.equal(gradient, tree_sum([each[name] for each in every]))
    outer.close()


def test_common_weights_that_differ_are_found(mesh: Mesh) -> None:
    outer, weights = begun(mesh)
    move(weights, weights_of(mesh.comm.rank, 4))
    outer.forget_round()
    assert all(torch.equal(weights[name], outer.common[name]) for name in SHAPES)
    move(weights, weights_of(mesh.comm.rank, 4))
    outer.take_common()
    if mesh.comm.size > 1:
        with pytest.raises(CommError, match="along island must hold the same weights"):
            outer.check_common()
    outer.close()
