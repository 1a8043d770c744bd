"""Weights gathered layer by layer, compared with one process that has all of them at any time."""

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from mpillm.comm.mesh import Mesh
from mpillm.machine.node_map import NodeMap
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import build_without_values, create
from mpillm.parallel.data import weight_pages
from mpillm.parallel.data.gathered_unit import GatheredUnit
from mpillm.parallel.data.gathered_weights import GatheredWeights
from mpillm.parallel.data.same_weights import check_same
from mpillm.parallel.data.zero import PLAIN_STEP, ShardStep, ZeroGradients
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.parallel.pipeline.stage import Batch, ModelStage
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import plan_step
from mpillm.tasks.causal_lm import CausalLM

LAYERS, ROWS, SEED = 4, 12, 5
SPEC = DecoderConfig(vocab_size=40, layers=LAYERS, width=32, heads=2, context=8)
LEARNING_RATE = 0.1


def batch() -> torch.Tensor:
    return torch.randint(40, (ROWS, 9), generator=torch.Generator().manual_seed(3))


def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    losses = nn.functional.cross_entropy(
        model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    return losses / (ROWS * 8)


@torch.no_grad()
def update(weights: Iterable[nn.Parameter]) -> None:
    """Step by gradient descent: torch's optimizers load its compiler, which takes seconds."""
    for weight in weights:
        weight -= LEARNING_RATE * weight.grad


def alone(steps: int, recompute: str = "none") -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train by plain torch; return the losses and the weights."""
    model, losses = create(SPEC, SEED), []
    model.set_recompute(recompute)
    for _ in range(steps):
        model.zero_grad()
        value = loss(model, batch())
        value.backward()
        update(model.parameters())
        losses.append(value.item())
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


class Trained:
    """A decoder whose weights the ranks of `comm` gather, each on a node of its own."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        nodes: NodeMap | None = None,
        step: ShardStep = PLAIN_STEP,
        spec: DecoderConfig = SPEC,
        **settings,
    ) -> None:
        if comm.size == 1:
            pytest.skip("one rank has nothing to gather")
        self.comm = comm
        self.mesh = Mesh(comm, {"data": comm.size}, nodes or apart(comm))
        self.model = build_without_values(spec)
        self.blocks = [block for _, block in self.model.numbered_blocks()]
        named = dict(self.model.named_parameters())
        parallel, axis = ParallelSettings(zero=3, **settings), self.mesh.axis("data")
        self.gradients = ZeroGradients([named], axis, parallel, step, blocks=[self.blocks])
        assert self.gradients.gathered is not None
        self.gathered: GatheredWeights = self.gradients.gathered
        self.stepped = self.gradients.optimizer_weights(named)
        self.gradients.initialise([self.model], SEED)

    def own(self) -> torch.Tensor:
        rows = ROWS // self.comm.size
        return batch()[self.comm.rank * rows : (self.comm.rank + 1) * rows]

    def step(self, microbatch: int = ROWS) -> float:
        """Run a step over this rank's share; return its part of the batch's loss."""
        total = 0.0
        self.gradients.begin()
        with self.gathered.reading():
            for ids in self.own().split(microbatch):
                value = loss(self.model, ids)
                value.backward()
                self.gradients.microbatch_ended(0)
                total += value.item()
        self.gradients.finish()
        update(self.stepped.values())
        self.gradients.updated()
        return total

    def held_blocks(self) -> list[int]:
        """Return the numbers of the blocks of which some weight has memory."""
        return [n for n, block in enumerate(self.blocks) if any(map(nbytes, block.parameters()))]

    def close(self) -> None:
        self.gradients.close()
        self.mesh.free()


def apart(comm: MPI.Intracomm) -> NodeMap:
    return NodeMap(tuple((rank,) for rank in range(comm.size)))


def nbytes(weight: torch.Tensor) -> int:
    return weight.untyped_storage().nbytes()


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_training_is_that_of_one_process(comm: MPI.Intracomm, recompute: str) -> None:
    losses, weights = alone(2, recompute)
    for microbatch in (1, ROWS) if recompute == "none" else (2,):
        trained = Trained(comm)
        trained.model.set_recompute(recompute)
        own = [trained.step(microbatch) for _ in range(2)]
        found = [sum(parts) for parts in zip(*comm.allgather(own), strict=True)]
        assert found == pytest.approx(losses, rel=1e-6)
        read = trained.gathered.read_each(trained.model.parameters())
        for (name, _), weight in zip(trained.model.named_parameters(), read, strict=True):
            assert torch.allclose(weight, weights[name], rtol=1e-5, atol=1e-6), name
        trained.close()


@pytest.mark.parametrize("on_node", [False, True])
def test_two_nodes_without_shared_memory_gather_in_two_levels(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, on_node: bool
) -> None:
    if comm.size != 4:
        pytest.skip("needs two nodes of two ranks")
    monkeypatch.setattr(weight_pages, "share_segment", lambda *given: "no room")
    check_losses(Trained(comm, NodeMap(((0, 1), (2, 3))), zero_on_node=on_node))


def test_unevenly_many_ranks_on_nodes_gather(comm: MPI.Intracomm) -> None:
    if comm.size != 3:
        pytest.skip("needs a node of two ranks and one of one")
    # Each start is compared with those of the other ranks.
    check_losses(Trained(comm, NodeMap(((0, 1), (2,))), debug=True))


def check_losses(trained: Trained) -> None:
    own = [trained.step(1) for _ in range(3)]
    found = [sum(parts) for parts in zip(*trained.comm.allgather(own), strict=True)]
    assert found == pytest.approx(alone(3)[0], rel=1e-6)
    trained.close()


def test_an_evaluation_has_the_bits_of_one_process(comm: MPI.Intracomm) -> None:
    trained, whole = Trained(comm), create(SPEC, SEED).eval()
    trained.model.eval()
    with torch.inference_mode(), trained.gathered.reading():
        for ids in (batch()[:2, :-1], batch()[2:5, :-3]):
            assert torch.equal(trained.model(ids), whole(ids))
    assert trained.held_blocks() == []
    trained.close()


def test_one_block_has_memory_and_one_arrives(comm: MPI.Intracomm) -> None:
    trained = Trained(comm)
    seen: set[tuple[str, int]] = set()

    def look(number: int, where: str) -> None:
        assert trained.held_blocks() == [number], where
        seen.add((where, number))

    for number, block in enumerate(trained.blocks):
        for layer in block.modules():
            layer.register_forward_pre_hook(lambda *given, n=number: look(n, "forward"))
        for weight in block.parameters():
            weight.register_post_accumulate_grad_hook(lambda _, n=number: look(n, "backward"))
    trained.model.set_recompute("full")
    trained.step(2)
    assert len(seen) == 2 * LAYERS
    # Between steps a rank has its own runs, and the room of one block.
    assert not any(map(nbytes, trained.model.parameters()))
    block = sum(weight.numel() for weight in trained.blocks[0].parameters())
    assert block <= trained.gathered.row.numel() <= 1.1 * block
    kept = sum(weight.numel() for weight in trained.stepped.values())
    count = sum(weight.numel() for weight in trained.model.parameters())
    assert comm.allreduce(kept) == count
    trained.close()


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_weights_have_no_memory_before_they_are_gathered(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, device: torch.device | None
) -> None:
    """As on a GPU that has no room for all of them."""
    if comm.size == 1:
        pytest.skip("one rank has nothing to gather")
    most, allocate = 0, GatheredUnit._allocate

    def counted(unit: GatheredUnit) -> None:
        nonlocal most
        allocate(unit)
        most = max(most, sum(map(nbytes, named.values())))

    model = build_without_values(SPEC)
    named = dict(model.named_parameters())
    monkeypatch.setattr(GatheredUnit, "_allocate", counted)
    mesh, blocks = Mesh(comm, {"data": comm.size}, apart(comm)), model.numbered_blocks()
    sync = ZeroGradients(
        [named],
        mesh.axis("data"),
        ParallelSettings(zero=3),
        ShardStep(device=device),
        blocks=[[block for _, block in blocks]],
    )
    # Of one block, or of what is outside of blocks.
    units = {id(unit): unit for unit in sync.gathered._unit_of.values()}.values()
    assert most == max(sum(4 * weight.numel() for weight in unit.weights) for unit in units)
    assert not any(map(nbytes, named.values()))
    sync.close()
    mesh.free()


def test_the_next_block_arrives_while_one_computes(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(comm)
    blocks = traced(trained, monkeypatch)
    trained.step()
    forward = [("gather", 0), ("gather", 1)]
    forward += [e for n in range(LAYERS - 2) for e in (("forward", n), ("gather", n + 2))]
    forward += [("forward", LAYERS - 2), ("forward", LAYERS - 1)]
    # The last block is there when the backward pass begins with it.
    backward = [
        event for n in reversed(range(1, LAYERS)) for event in (("gather", n - 1), ("backward", n))
    ]
    assert blocks == [*forward, *backward, ("backward", 0)]
    trained.close()


def traced(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the list of what happens to blocks from now on, with their numbers."""
    events: list[tuple[str, int]] = []
    units = {
        id(weight): number
        for number, block in enumerate(trained.blocks)
        for weight in block.parameters()
    }
    start = GatheredUnit.start

    def started(unit: GatheredUnit, stretch: int = 0) -> None:
        number = units.get(id(unit.weights[0]))
        if number is not None:
            events.append(("gather", number))
        start(unit, stretch)

    monkeypatch.setattr(GatheredUnit, "start", started)
    for number, block in enumerate(trained.blocks):
        block.attention.register_forward_hook(lambda *_, n=number: events.append(("forward", n)))
        block.attention.output.weight.register_post_accumulate_grad_hook(
            lambda _, n=number: events.append(("backward", n))
        )
    return events


def test_the_next_block_arrives_after_an_input_half_too(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(comm, step=ShardStep(splits=True), spec=SPEC.replace(tied=False))
    events = traced(trained, monkeypatch)
    run_stage(trained, "F0 I0 F1 I1 W0 W1")
    up = range(LAYERS)
    forward = [e for n in up for e in (("gather", n + 1), ("forward", n)) if e[1] < LAYERS]
    back = [("gather", n) for n in reversed(up[:-1])]
    ahead = [e for n in up for e in (("gather", n + 1), ("backward", n)) if e[1] < LAYERS]
    halves = [*forward, *back]
    assert events == [("gather", 0), *halves, *halves, *ahead, ("gather", 0), *ahead]
    trained.close()


def run_stage(trained: Trained, order: str) -> None:
    """Run the passes of a step as a stage of one rank does: `F0` is the forward pass of microbatch
    0, and so on.
    """
    actions = [(each[0], int(each[1:])) for each in order.split()]
    task, rows = CausalLM(), batch().numpy()
    stage = ModelStage(trained.model, 0, trained.gradients, task)
    count = 1 + max(number for _, number in actions)
    stage.batch = Batch([task.fields({"tokens": part}) for part in np.split(rows, count)], 1.0)
    trained.gradients.begin()
    with trained.gathered.reading():
        for kind, number in actions:
            if kind == "F":
                stage.forward(number, ())
            elif kind == "W":
                stage.backward_weight(number)
            else:
                (stage.backward if kind == "B" else stage.backward_input)(number, ())
    trained.gradients.finish()


def test_each_half_of_a_backward_pass_gathers(comm: MPI.Intracomm) -> None:
    # A tied head must be another leaf.
    spec = SPEC.replace(tied=False)
    trained, whole = Trained(comm, step=ShardStep(splits=True), spec=spec), create(spec, SEED)
    loss(whole, batch()).backward()
    ids, targets = batch()[:, :-1], batch()[:, 1:].flatten()
    weights = [set(block.parameters()) for block in trained.blocks]
    read: list[int] = []

    def ahead(leaves) -> None:
        trained.gathered.before_gradients(leaves)
        assert all(map(nbytes, leaves))
        read.extend(number for number, own in enumerate(weights) if own.intersection(leaves))

    trained.gradients.begin()
    with trained.gathered.reading():
        made = trained.model.forward_part({"ids": ids}, ())
        logits = made.outputs[0].logits().flatten(0, 1)
        value = nn.functional.cross_entropy(logits, targets, reduction="sum") / len(targets)
        split = SplitBackward((value,), made.pivots)
        split.input((None,))
        assert trained.held_blocks() == [0]
        # Another pass comes between the halves.
        loss(trained.model, batch()[:2])
        assert trained.held_blocks() == [LAYERS - 1]
        split.weights(ahead)
        trained.gradients.microbatch_ended(0)
    trained.gradients.finish()
    assert read == sorted(read)
    assert set(read) == set(range(LAYERS))
    check_gradients(trained.gradients, trained.model, trained.stepped, whole, comm)
    trained.close()


def check_gradients(
    sync: ZeroGradients,
    model: nn.Module,
    stepped: Mapping[str, nn.Parameter],
    whole: nn.Module,
    comm: MPI.Intracomm,
) -> None:
    """Compare the sums over ranks that all computed the same with the gradients of `whole`."""
    named, others = dict(model.named_parameters()), dict(whole.named_parameters())
    assert stepped
    for name, weight in stepped.items():
        first = sync.first_element(named[name])
        own = others[name].grad.view(-1)[first : first + weight.numel()]
        assert torch.allclose(weight.grad.view(-1), own * comm.size, rtol=1e-4, atol=1e-7), name


def test_a_gather_that_is_not_wanted_is_dropped(comm: MPI.Intracomm) -> None:
    trained, whole = Trained(comm), create(SPEC, SEED)
    x_BTC = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    others = [block for _, block in whole.numbered_blocks()]
    rotation = whole._rotations(0, x_BTC)[0]
    with torch.no_grad(), trained.gathered.reading():
        for number in (0, 3, 1, 1, 0):
            given = x_BTC, rotation, None, None, 0
            assert torch.equal(trained.blocks[number](*given), others[number](*given))
            assert trained.held_blocks() == [number]
    trained.close()


class Block(nn.Module):
    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.shared = shared

    def forward(self, x):
        return x + self.inner(torch.tanh(x)) @ self.shared


class Net(nn.Module):
    """Two blocks that share a weight; a layer of the first is called from outside of it, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        shared = nn.Parameter(torch.randn(16, 16))
        self.blocks = nn.ModuleList([Block(shared), Block(shared)])
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        x = x + self.blocks[0].inner(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x).square().mean()


def test_weights_read_outside_of_their_block_are_there(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to gather")
    net, whole, mesh = Net(), Net(), Mesh(comm, {"data": comm.size}, apart(comm))
    named, settings = dict(net.named_parameters()), ParallelSettings(zero=3)
    values = {name: weight.detach().clone() for name, weight in named.items()}
    sync = ZeroGradients([named], mesh.axis("data"), settings, blocks=[list(net.blocks)])
    stepped = sync.optimizer_weights(named)
    with torch.no_grad():
        for name, weight in named.items():
            sync.fill(weight, values[name])
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    expected = whole(x)
    expected.backward()
    sync.begin()
    assert sync.gathered is not None
    with sync.gathered.reading():
        found = net(x)
        found.backward()
        sync.microbatch_ended(0)
    sync.finish()
    assert torch.equal(found, expected)
    check_gradients(sync, net, stepped, whole, comm)
    sync.close()
    mesh.free()


@pytest.mark.parametrize("on_node", [False, True])
def test_ranks_that_read_the_same_owners_are_not_compared(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, on_node: bool
) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nothing to gather")
    monkeypatch.setattr(weight_pages, "share_segment", lambda *given: "no room")
    half = comm.size // 2
    nodes = NodeMap((tuple(range(half)), tuple(range(half, comm.size))))
    settings = ParallelSettings(zero=3, zero_on_node=on_node, data=comm.size)
    plan = plan_step(SPEC, settings, comm.size, comm.size)
    mesh = Mesh(comm, {"pipeline": 1, "data": comm.size}, nodes)
    model = ShardedModel(SPEC, CausalLM(), SEED, mesh, plan, settings)
    # Two nodes of two ranks have all shards each.
    compared = on_node and comm.size == 4
    assert [axis.name for _, axis in model.replicas] == ["data"] * compared
    for weights, axis in model.replicas:
        check_same(weights, axis)
    model.close()
    mesh.free()
