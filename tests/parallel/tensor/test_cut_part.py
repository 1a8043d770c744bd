"""Cut models against whole ones: losses, logits and gradients, of random shapes and settings."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from torch import Tensor

from mpillm.comm.communicator import Communicator
from mpillm.comm.mesh import Axis
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import PartModule, build_without_values, create, initialise
from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.parallel.tensor.cut_part import cut_part
from mpillm.parallel.tensor.stream import TensorStream
from mpillm.parallel.tensor.tensor_axis import TensorAxis
from mpillm.parallel.tensor.vocabulary_shard import ShardExchange
from mpillm.parallel.tensor.weight_cuts import WeightCut
from mpillm.tasks.cross_entropy import cross_entropy_sum

SEED = 7
FAR = 1e-5
# Of the largest stream, in bytes.
ROOM = 5 * 12 * 20 * 4
TERMS = (0.1, 1e-2)
BACKWARD = ("whole", "halves")
# The same examples on every rank; several ranks cannot share a database of failures.
ALIKE = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    # Without shrinking: it runs a failing example hundreds of times.
    phases=[Phase.generate],
)


@dataclass(frozen=True)
class Ranks:
    """The stream of all ranks, and what a part is cut with."""

    comm: MPI.Intracomm
    stream: TensorStream
    shards: ShardExchange

    def cut(self, spec: ModelSpec) -> tuple[PartModule, dict[str, WeightCut]]:
        """Make a rank's share of the model, with the cuts of its weights."""
        part = build_without_values(spec)
        cuts = cut_part(part, self.stream, self.shards)
        initialise(part, SEED)
        return part, cuts

    def check(self, faults: list[str]) -> None:
        """Fail on every rank where one has a fault: the ranks try the same examples."""
        assert [fault for each in self.comm.allgather(faults) for fault in each] == []


@pytest.fixture(params=["shared", "messages"], scope="module")
def ranks(comm: MPI.Intracomm, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    if comm.size == 1:
        pytest.skip("an axis of one rank is left out of the mesh")
    apart = NodeMap(tuple((rank,) for rank in range(comm.size)))
    node_map = apart if request.param == "messages" else map_nodes(comm)
    group = Communicator(comm, node_map=node_map)
    stream = TensorStream(Axis("tensor", comm.size, comm.rank, comm, node_map), group)
    yield Ranks(comm, stream, ShardExchange(group))
    assert stream.is_shared == (request.param == "shared")
    group.free()


@st.composite
def specs(draw: st.DrawFn, ranks: int) -> ModelSpec:
    """Draw a decoder, or an encoder that ends in a vocabulary."""
    heads = ranks * draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    common = {
        "layers": draw(st.integers(1, 2)),
        "width": draw(st.integers(4, 20)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": draw(st.sampled_from([2, 4, 6])),
        "hidden": draw(st.integers(ranks, 19)),
        "vocab_size": draw(st.integers(ranks, 40)),
        "context": 12,
        "activation": draw(st.sampled_from(["swiglu", "gelu", "geglu", "relu"])),
        "bias": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "query_key_norm": draw(st.booleans()),
        "attention_soft_cap": draw(st.sampled_from([0.0, 2.0])),
        "window": draw(st.sampled_from([0, 4])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.3])),
        "embedding_dropout": draw(st.sampled_from([0.0, 0.3])),
        "tied": draw(st.booleans()),
        "positions": draw(st.sampled_from(["rotary", "learned", "none"])),
        "norm": draw(st.sampled_from(["rmsnorm", "rmsnorm1p", "layernorm"])),
    }
    if draw(st.booleans()):
        cap = draw(st.sampled_from([0.0, 3.0]))
        place = draw(st.sampled_from(["pre", "sandwich"]))
        scaled = draw(st.booleans())
        return DecoderConfig(
            **common, logits_soft_cap=cap, norm_place=place, scaled_embedding=scaled
        )
    place = draw(st.sampled_from(["pre", "post"]))
    return EncoderConfig(**common, token_types=2, norm_place=place, head="lm")


def fields_of(spec: ModelSpec, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + length)

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=generator)

    fields = {name: draw(spec.vocab_size, rows, length) for name in ("ids", "targets")}
    fields["counts"] = draw(3, rows, length).float()
    if spec.drops:
        fields["dropout_keys"] = draw(1 << 40, rows)
    return fields


def loss_of(part: PartModule, fields: dict[str, Tensor], backward: str) -> float:
    """Compute the loss and the gradients of `part`."""
    made = part.forward_part(fields, ())
    loss = cross_entropy_sum(made.outputs[0], fields["targets"], fields["counts"], *TERMS)
    if backward == "halves":
        halves = SplitBackward((loss,), made.pivots)
        halves.input((None,))
        halves.weights()
    else:
        loss.backward()
    return float(loss.detach())


def distance(found: Tensor, expected: Tensor, least: float) -> float:
    return float((found - expected).norm() / max(float(expected.norm()), least, 1e-30))


def grow(part: PartModule) -> None:
    """Scale the weights, which are small at first, so that each of them changes the loss."""
    with torch.no_grad():
        for name, weight in part.named_weights():
            if name.endswith("bias"):
                weight.fill_(0.1)
            elif weight.dim() > 1:
                weight.mul_(10)


@given(example=st.data())
@ALIKE
def check_gradients(ranks: Ranks, example: st.DataObject) -> None:
    spec = example.draw(specs(ranks.comm.size))
    rows, length = example.draw(st.integers(1, 5)), example.draw(st.integers(4, 12))
    backward = example.draw(st.sampled_from(BACKWARD if not spec.tied_weights else BACKWARD[:1]))
    recompute = example.draw(st.sampled_from(["none", "attention", "full"]))
    fields = fields_of(spec, rows, length)
    whole, (part, cuts) = create(spec, SEED), ranks.cut(spec)
    grow(whole)
    grow(part)
    expected = loss_of(whole, fields, "whole")
    part.set_recompute(recompute)
    ranks.stream.enter(rows, length, ROOM)
    found = loss_of(part, fields, backward)
    gradients = {name: weight.grad for name, weight in whole.named_weights()}
    least = 1e-2 * max(float(gradient.norm()) for gradient in gradients.values())
    faults = [] if found == pytest.approx(expected, rel=FAR) else [f"loss {found}, not {expected}"]
    for name, weight in part.named_weights():
        own, gradient = gradients[name], weight.grad
        # A slice may be near 0 by cancellation, which leaves rounding alone.
        mean = float(own.norm()) / ranks.comm.size
        if name in cuts:
            own = own[cuts[name].index]
        else:
            gradient = torch.from_numpy(ranks.comm.allreduce(gradient.numpy()))
        if (error := distance(gradient, own, max(least, mean))) > FAR:
            faults.append(f"gradient of {name} is off by {error:.1e}")
    ranks.check(faults)


def test_gradients_are_those_of_the_whole_model(ranks: Ranks) -> None:
    check_gradients(ranks)


@given(example=st.data())
@ALIKE
def check_logits(ranks: Ranks, example: st.DataObject) -> None:
    spec = example.draw(specs(ranks.comm.size))
    rows, length = example.draw(st.integers(1, 5)), example.draw(st.integers(4, 12))
    fields = fields_of(spec, rows, length)
    with torch.inference_mode():
        expected = plain_outputs(create(spec, SEED).eval().forward_part(fields, ()).outputs)[0]
        part = ranks.cut(spec)[0].eval()
        ranks.stream.enter(rows, length, ROOM)
        found = plain_outputs(part.forward_part(fields, ()).outputs)[0]
    error = distance(found, expected, 0.0)
    ranks.check([f"logits are off by {error:.1e}"] if error > FAR else [])


def test_logits_are_those_of_the_whole_model(ranks: Ranks) -> None:
    check_logits(ranks)


@pytest.mark.parametrize("rows", [1, 12])
def test_bytes_are_those_of_the_formula(ranks: Ranks, rows: int) -> None:
    size = ranks.comm.size
    spec = DecoderConfig(layers=3, width=12, heads=12, context=12, positions="none", vocab_size=20)
    part, _ = ranks.cut(spec)
    before = ranks.stream.sent_bytes
    ranks.stream.enter(rows, spec.context, ROOM)
    loss_of(part, fields_of(spec, rows, spec.context), "whole")
    sent = ranks.comm.allreduce(ranks.stream.sent_bytes - before) / size
    sizes = {"data": 1, "pipeline": 1, "tensor": size}
    assert sent == TensorAxis().traffic_bytes(sizes, spec, rows, 1, MessageBytes())
