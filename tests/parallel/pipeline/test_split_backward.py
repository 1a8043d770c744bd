"""A backward pass in two halves compared with a whole one."""

import copy
import gc
import weakref

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import SHAPES, EncoderConfig
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create
from mpillm.models.spec import Part
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.tasks.cross_entropy import cross_entropy_sum

CONFIGS = [
    {},
    {"kv_heads": 2, "tied": False},
    {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
]


def config(**changes):
    return DecoderConfig(
        **{"layers": 3, "width": 32, "heads": 4, "context": 16, "vocab_size": 50, **changes}
    )


def tokens(rows=3):
    return torch.randint(50, (rows, 17), generator=torch.Generator().manual_seed(3))


def stream(rows=3):
    return torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(5))


def compute(part):
    """Return the part's output, and its pivot: the stream, or the output of the embedding."""
    pivots = []
    if part.begins:
        part.embedding.register_forward_hook(lambda module, given, output: pivots.append(output))
        y = part(tokens()[:, :-1])
    else:
        pivots.append(stream().requires_grad_())
        y = part(pivots[0])
    return (cross_entropy_sum(y, tokens()[:, 1:]) if part.ends else y), pivots[0]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_halves_have_the_bits_of_one_whole(changes, layers, autocast):
    whole = create(config(**changes), 1, part=Part(*layers))
    if whole.begins and whole.ends:
        whole.set_weight("head.weight", torch.nn.Parameter(whole.embedding.weight.data))
    halves = copy.deepcopy(whole)
    gradients = None if whole.ends else torch.randn(3, 16, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, x = compute(whole)
        z, pivot = compute(halves)
    x.retain_grad()
    y.backward(gradients)
    split = SplitBackward((z,), (pivot,))
    (found,) = split.input((gradients,))
    assert torch.equal(found, x.grad)
    assert all(weight.grad is None for weight in halves.parameters()), (
        "the first half leaves the weights alone"
    )
    split.weights()
    for (name, weight), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad), name


BERT = EncoderConfig(layers=3, width=32, heads=4, context=16, vocab_size=50, token_types=2)
IMAGES = SHAPES["vit-tiny-digits"].replace(layers=3, width=32, classes=5)
ENCODERS = {
    "bert": BERT,
    "without types": BERT.replace(token_types=1, tied=False),
    "modernbert": SHAPES["modernbert-tiny"].replace(
        layers=3, width=32, hidden=48, context=16, vocab_size=50, window=4
    ),
    "classes": BERT.replace(head="sequence", head_layer="tanh", classes=4),
    "images": IMAGES,
    "sound": SHAPES["sound-tiny"].replace(layers=3, width=32, context=16, mels=8, vocab_size=50),
}


def fields_of(kind):
    generator = torch.Generator().manual_seed(8)
    fields = {
        "ids": tokens()[:, :-1],
        "token_types": tokens()[:, :-1] % 2,
        "pixels": torch.randn(3, 1, 8, 8, generator=generator),
        "frames": torch.randn(3, 32, 8, generator=generator),
        "lengths": torch.tensor([16, 4, 9]),
    }
    left_out = {"without types": "token_types", "images": "lengths"}.get(kind)
    return {name: field for name, field in fields.items() if name != left_out}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (2, 3), (0, 3)], ids=str)
def test_two_halves_of_an_encoder_have_the_bits_of_one_whole(kind, layers):
    spec = ENCODERS[kind]
    whole = create(spec, 1, part=Part(*layers))
    if whole.begins and whole.ends and spec.tied_weights:
        whole.set_weight("head.weight", torch.nn.Parameter(whole.embedding.weight.data))
    halves = copy.deepcopy(whole)

    def compute_part(part):
        given = stream()[:, : spec.context]
        given = torch.cat([given, given[:, :1]], 1) if spec.context > 16 else given
        streams = () if part.begins else (given.clone().requires_grad_(),)
        made = part.forward_part(fields_of(kind), streams)
        (output,) = plain_outputs(made.outputs)
        return (output.square().sum() if part.ends else output), made.pivots[0]

    y, x = compute_part(whole)
    z, pivot = compute_part(halves)
    gradient = None if whole.ends else torch.randn_like(y)
    x.retain_grad()
    y.backward(gradient)
    split = SplitBackward((z,), (pivot,))
    (found,) = split.input((gradient,))
    assert torch.equal(found, x.grad)
    assert all(weight.grad is None for weight in halves.parameters())
    split.weights()
    for (name, weight), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad), name


def test_the_second_half_lets_the_graph_go():
    kept = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its graph it would make a cycle of its own
            kept.add(self)

    part = create(config(), 1, part=Part(1, 2))
    x = stream().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        y = part(x)
    gc.disable()
    try:
        split = SplitBackward((y,), (x,))
        split.input((torch.ones_like(y),))
        assert len(kept) > 10
        split.weights()
        del y, split
        assert not kept, "no cycle keeps the activations"
    finally:
        gc.enable()


def test_halves_of_two_microbatches_accumulate():
    part = create(config(), 1, part=Part(1, 2))
    plain = copy.deepcopy(part)
    splits = []
    for scale in (1.0, 2.0):
        plain(stream() * scale).sum().backward()
        x = (stream() * scale).requires_grad_()
        splits.append(SplitBackward((part(x).sum(),), (x,)))
    for split in splits:
        split.input((None,))
    for split in splits:
        split.weights()
    for weight, other in zip(plain.parameters(), part.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad)


class TwoStreams(torch.nn.Module):
    """A stage of a decoder with cross-attention: reads the encoder's stream, and passes it on."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(7)
        self.kind = kind
        self.source, self.target = torch.nn.Embedding(50, 32), torch.nn.Embedding(50, 32)
        self.keys, self.values, self.queries = (torch.nn.Linear(32, 32) for _ in range(3))
        self.norm, self.up, self.down = (
            torch.nn.LayerNorm(32),
            torch.nn.Linear(32, 64),
            torch.nn.Linear(64, 32),
        )
        self.bias = torch.nn.Parameter(torch.randn(3, 16, 32))

    def forward(self, memory, x):
        x = x + torch.nn.functional.scaled_dot_product_attention(
            self.queries(self.norm(x)), self.keys(memory), self.values(memory)
        )
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        if self.kind == "changed":
            return torch.tanh(memory), x
        if self.kind == "aside":  # an output of weights alone
            return memory, x, self.bias * self.bias
        return memory, x


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", ["passed", "changed", "aside"])
def test_two_streams_have_the_bits_of_one_whole(kind, begins, ends):
    whole = TwoStreams(kind)
    halves = copy.deepcopy(whole)
    generator = torch.Generator().manual_seed(11)
    for _ in range(2):  # the second microbatch adds to the gradients of the first
        ids = torch.randint(50, (2, 3, 16), generator=generator)
        given = torch.randn(2, 3, 16, 32, generator=generator)
        gradients = tuple(torch.randn(3, 3, 16, 32, generator=generator))

        def compute_two(part, ids=ids, given=given):
            if begins:
                pivots = part.source(ids[0]), part.target(ids[1])
            else:
                pivots = tuple(stream.clone().requires_grad_() for stream in given)
            outputs = part(*pivots)
            return ((outputs[1].square().sum(),) if ends else outputs), pivots

        outputs, pivots = compute_two(whole)
        for pivot in pivots:
            pivot.retain_grad()
        gradients = (None,) if ends else gradients[: len(outputs)]
        torch.autograd.backward(outputs, gradients)
        outputs, own = compute_two(halves)
        before = [
            weight.grad if weight.grad is None else weight.grad.clone()
            for weight in halves.parameters()
        ]
        split = SplitBackward(outputs, own)
        found = split.input(gradients)
        for gradient, pivot in zip(found, pivots, strict=True):
            assert torch.equal(gradient, pivot.grad)
        for weight, grad in zip(halves.parameters(), before, strict=True):
            assert (weight.grad is None) == (grad is None)
            assert grad is None or torch.equal(weight.grad, grad), "the input half leaves it alone"
        split.weights()
    for (name, weight), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        assert weight.grad is None or torch.equal(weight.grad, other.grad), name
    assert any(weight.grad is not None for weight in halves.parameters())


def test_pivots_that_one_operation_made():
    weight = torch.randn(4, 6, requires_grad=True)
    a, b = (torch.ones(2, 4) @ weight).split(3, dim=1)
    split = SplitBackward(((a * 2).sum(), (b * 3).sum()), (a, b))
    found = split.input((None, None))
    assert [float(gradient[0, 0]) for gradient in found] == [2, 3]
    split.weights()
    expected = torch.tensor([2.0] * 3 + [3.0] * 3).repeat(4, 1) * 2
    assert torch.equal(weight.grad, expected)


def test_a_pivot_that_is_not_used_has_a_gradient_of_zeros():
    used, unused = (torch.randn(3, requires_grad=True) for _ in range(2))
    split = SplitBackward(((used * 2).sum(),), (used, unused))
    found = split.input((None,))
    assert torch.equal(found[0], torch.full((3,), 2.0))
    assert torch.equal(found[1], torch.zeros(3))
    split.weights()
