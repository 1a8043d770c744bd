"""Shards of gradients, states and weights, compared with one process that sees the whole batch."""

import time
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Mesh
from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap
from mpillm.parallel.data import weight_pages
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.zero import ZeroGradients
from mpillm.parallel.grad_norm import gradient_norm
from mpillm.parallel.settings import ParallelSettings

ROWS, WIDTH = 12, 40
# Pieces of the norm, and units, end inside of weights.
UNIT_BYTES = 64 << 10


class Net(nn.Module):
    """A weight of several pieces of the norm, a tied one, a frozen one and one without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.up = nn.Linear(WIDTH, 1900)
        self.down = nn.Linear(1900, WIDTH)
        self.unused = nn.Linear(WIDTH, 3)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.down(torch.tanh(self.up(self.embedding(ids)))) * self.frozen)


def net() -> Net:
    torch.manual_seed(7)
    return Net()


def batch() -> torch.Tensor:
    return torch.randint(50, (ROWS, 9), generator=torch.Generator().manual_seed(3))


def loss(model: Net, ids: torch.Tensor) -> torch.Tensor:
    losses = nn.functional.cross_entropy(
        model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    return losses / (ROWS * 8)


def alone(steps: int, microbatch: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on the whole batch by plain torch; return the losses and the weights."""
    model, losses = net(), []
    optimizer = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad], lr=1e-3, eps=1e-4
    )
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for part in batch().split(microbatch):
            value = loss(model, part)
            value.backward()
            total += value.item()
        for weight in model.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()
        losses.append(total)
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


class Trained:
    """A net whose weights the ranks of `comm` share out."""

    def __init__(
        self, comm: MPI.Intracomm, nodes: NodeMap | None = None, warn=silent, **settings
    ) -> None:
        self.comm, self.mesh = comm, Mesh(comm, {"data": comm.size}, nodes)
        self.model, values = net(), dict(net().named_parameters())
        parallel = ParallelSettings(bucket_bytes=UNIT_BYTES, **settings)
        named = dict(self.model.named_parameters())
        axis = self.mesh.axis("data")
        self.gradients = ZeroGradients([named], axis, parallel, warn=warn)
        self.stepped = self.gradients.optimizer_weights(named)
        with torch.no_grad():
            for name, weight in named.items():
                self.gradients.fill(weight, values[name])
        self.gradients.updated()
        trained = [weight for weight in self.stepped.values() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
        self.delay = {"forward": 0.0, "update": 0.0}

    def step(self, microbatch: int) -> float:
        """Run a step over this rank's share; return its part of the batch's loss."""
        rows = ROWS // self.comm.size
        own = batch()[self.comm.rank * rows : (self.comm.rank + 1) * rows]
        self.gradients.begin()
        time.sleep(self.delay["forward"])
        total = 0.0
        with self.reading():
            for part in own.split(microbatch):
                value = loss(self.model, part)
                value.backward()
                self.gradients.microbatch_ended(0)
                total += value.item()
        self.gradients.finish()
        time.sleep(self.delay["update"])
        self.optimizer.step()
        self.gradients.updated()
        return total

    def reading(self) -> AbstractContextManager[None]:
        gathered = self.gradients.gathered
        return gathered.reading() if gathered else nullcontext()

    def losses(self, steps: int, microbatch: int = ROWS) -> list[float]:
        """Run steps without a message between them; return the losses of the whole batches."""
        own = [self.step(microbatch) for _ in range(steps)]
        return [sum(parts) for parts in zip(*self.comm.allgather(own), strict=True)]

    def close(self) -> None:
        self.gradients.close()
        self.mesh.free()


def needs_ranks(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to share out")


def layouts(comm: MPI.Intracomm) -> list[NodeMap | None]:
    """List node maps: one node, a node a rank, and two nodes of two ranks."""
    apart = NodeMap(tuple((rank,) for rank in range(comm.size)))
    return [None, apart, *([NodeMap(((0, 1), (2, 3)))] if comm.size == 4 else [])]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("microbatch", [1, ROWS])
def test_each_stage_trains_as_one_process(comm: MPI.Intracomm, stage: int, microbatch: int) -> None:
    needs_ranks(comm)
    losses, weights = alone(3, microbatch)
    for nodes in layouts(comm):
        for on_node in (False, True) if nodes and len(nodes.nodes) == 2 else (False,):
            trained = Trained(comm, nodes, zero=stage, zero_on_node=on_node)
            found = trained.losses(3, microbatch)
            assert found == pytest.approx(losses, rel=1e-6)
            with trained.reading():
                for name, weight in trained.model.named_parameters():
                    assert torch.allclose(weight, weights[name], rtol=1e-4, atol=1e-5), name
            trained.close()


def test_a_full_shared_memory_is_a_warning(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_ranks(comm)
    warnings: list[str] = []
    monkeypatch.setattr(weight_pages, "share_segment", lambda *given: "rank 1: no room")
    trained = Trained(comm, warn=warnings.append, zero=3)
    assert "weights gathered layer by layer" in trained.gradients.describe()
    assert len(warnings) == (comm.rank == 0)
    assert all("rank 1: no room; the weights" in text for text in warnings)
    assert trained.losses(3, 1) == pytest.approx(alone(3, 1)[0], rel=1e-6)
    trained.close()


def test_no_rank_reads_before_all_have_written(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that writes late, or reads late, changes no loss; without the barriers it would."""
    needs_ranks(comm)
    expected = alone(4, ROWS)[0]

    def losses() -> list[float]:
        trained = Trained(comm, zero=3)
        late = comm.rank == comm.size - 1
        trained.delay = {"forward": 0.02 * (not late), "update": 0.1 * late}
        found = trained.losses(4)
        trained.close()
        return found

    assert losses() == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(ShardGroup, "barrier", lambda self: None)
    assert losses() != pytest.approx(expected, rel=1e-6)


def test_a_node_has_the_weights_once(comm: MPI.Intracomm) -> None:
    needs_ranks(comm)
    trained = Trained(comm, zero=3)
    with torch.no_grad():
        if comm.rank == 0:
            trained.model.up.weight.fill_(5.0)
    comm.Barrier()
    assert trained.model.up.weight.unique().tolist() == [5.0]
    comm.Barrier()
    trained.close()


def test_the_norm_counts_each_element_once(comm: MPI.Intracomm) -> None:
    needs_ranks(comm)
    model = net()
    loss(model, batch()).backward()
    squares = [w.grad.double().square().sum() for w in model.parameters() if w.grad is not None]
    whole = float(sum(squares)) ** 0.5
    for stage in (1, 2, 3):
        trained = Trained(comm, zero=stage)
        trained.step(ROWS)
        found = gradient_norm(trained.gradients, comm, (0, 1))
        assert found == pytest.approx(whole, rel=1e-6)
        left_out = [trained.model.up.weight]
        less = gradient_norm(trained.gradients, comm, (0, 1), left_out)
        assert less < found
        trained.close()


def test_axes_on_unlike_nodes_number_their_shards_alike(comm: MPI.Intracomm) -> None:
    """Ranks of parallel axes exchange what they own: they must own the same."""
    if comm.size != 4:
        pytest.skip("needs four ranks on nodes of two")
    mesh = Mesh(comm, {"data": 4}, NodeMap(((0, 2), (1, 3))))
    by_node = ShardGroup(mesh.axis("data"))
    alike = ShardGroup(mesh.axis("data"), alike=False)
    assert by_node.shard_of_rank == [0, 1, 2, 3]
    assert alike.shard_of_rank == [0, 1, 2, 3]
    assert alike.within is None
    by_node.free()
    alike.free()
    mesh.free()


def test_too_few_weights_for_the_ranks_are_refused_on_all(comm: MPI.Intracomm) -> None:
    needs_ranks(comm)
    mesh = Mesh(comm, {"data": comm.size})
    small = {"weight": nn.Parameter(torch.ones(4, 4))}
    settings = ParallelSettings(zero=2)
    whole = {"needs_whole": lambda name, shape: True}
    with pytest.raises(LayoutError, match=r"1 weights that the optimizer needs whole.*fewer data"):
        ZeroGradients([small], mesh.axis("data"), settings, **whole)
    mesh.free()
