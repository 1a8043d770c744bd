"""A backward pass in two halves beside a whole one."""

import copy
import gc
import weakref

import pytest
import torch

from mpillm.models.config import DecoderConfig
from mpillm.models.decoder import Part, create, loss_sum
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.parallel.pipeline.tying import loosen

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
    """The part's output, and what the first half is to reach: the stream, or the embedding's output."""
    pivots = []
    if part.begins:
        part.embedding.register_forward_hook(lambda module, given, output: pivots.append(output))
        y = part(tokens()[:, :-1])
    else:
        pivots.append(stream().requires_grad_())
        y = part(pivots[0])
    return (loss_sum(y, tokens()[:, 1:]) if part.ends else y), pivots[0]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_halves_have_the_bits_of_one_whole(changes, layers, autocast):
    whole = create(config(**changes), 1, part=Part(*layers))
    if whole.begins and whole.ends:
        loosen(whole, whole)
    halves = copy.deepcopy(whole)
    gradients = None if whole.ends else torch.randn(3, 16, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, x = compute(whole)
        z, pivot = compute(halves)
    x.retain_grad()
    y.backward(gradients)
    split = SplitBackward(z, pivot)
    assert torch.equal(split.input(gradients), x.grad)
    assert all(weight.grad is None for weight in halves.parameters()), (
        "the first half leaves the weights alone"
    )
    split.weights()
    for (name, weight), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad), name


def test_the_second_half_lets_the_graph_go():
    kept = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its graph it would make a circle of its own
            kept.add(self)

    part = create(config(), 1, part=Part(1, 2))
    x = stream().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        y = part(x)
    gc.disable()
    try:
        split = SplitBackward(y, x)
        split.input(torch.ones_like(y))
        assert len(kept) > 10
        split.weights()
        del y, split
        assert not kept, "no circle keeps the activations"
    finally:
        gc.enable()


def test_halves_of_two_microbatches_accumulate():
    part = create(config(), 1, part=Part(1, 2))
    plain = copy.deepcopy(part)
    splits = []
    for scale in (1.0, 2.0):
        plain(stream() * scale).sum().backward()
        x = (stream() * scale).requires_grad_()
        splits.append(SplitBackward(part(x).sum(), x))
    for split in splits:
        split.input(None)
    for split in splits:
        split.weights()
    for weight, other in zip(plain.parameters(), part.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad)
