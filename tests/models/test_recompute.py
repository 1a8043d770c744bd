"""Layers that are computed again in the backward pass, compared with layers that keep their own."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.recompute import recomputed
from mpillm.models.part_module import create
from mpillm.models.spec import Part, recompute_of
from mpillm.parallel.pipeline.split_backward import SplitBackward

CONFIGS = [
    {"kv_heads": 2},
    {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
    {"dropout": 0.2, "attention_dropout": 0.3},
]
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 10] * 3)


def middle(**changes):
    """Make two layers of four, between an embedding and a head elsewhere."""
    config = {"layers": 4, "width": 32, "heads": 4, "context": 16, "vocab_size": 50, **changes}
    return create(DecoderConfig(**config), 1, part=Part(1, 3))


def tensors():
    generator = torch.Generator().manual_seed(5)
    x, gradient = (torch.randn(3, 16, 32, generator=generator) for _ in range(2))
    return x.requires_grad_(), gradient


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *given: calls.append(1))
    return calls


def compute(part, x, autocast=False):
    fields = {"documents": DOCUMENTS, "dropout_keys": torch.tensor([3, 1, 4])}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return part.forward_part(fields, (x,)).outputs[0]


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "two halves"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["attention", "full", 2])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_the_bits_are_those_of_kept_activations(changes, recompute, autocast, halves):
    kept, again = middle(**changes), middle(**changes)
    again.set_recompute(recompute)
    (x, gradient), (z, _) = tensors(), tensors()
    compute(kept, x, autocast).backward(gradient)
    calls = count_calls(again.layers["1"].attention)
    y = compute(again, z, autocast)
    if halves:
        split = SplitBackward((y,), (z,))
        (found,) = split.input((gradient,))
        # The rule: the input half recomputes, once; the weight half uses the same tensors.
        assert len(calls) == 2
        split.weights()
    else:
        y.backward(gradient)
        found = z.grad
    assert len(calls) == 2
    assert torch.equal(found, x.grad)
    for (name, weight), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad), name


def storages_of(module):
    """Collect weak references to the storages of a module's outputs."""
    found = []

    def note(module, given, output):
        found.append(StorageWeakRef(output.untyped_storage()))

    module.register_forward_hook(note)
    return found


@pytest.mark.parametrize("end", ["backward", "halves", "dropped"])
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_tensors_live_no_longer_than_they_must(recompute, end):
    part = middle()
    part.set_recompute(recompute)
    first = part.layers["1"]
    normed, inside, streams = map(storages_of, (first.attention_norm, first.feed_forward.up, first))
    # No cycle may keep a tensor until the garbage collector runs.
    gc.disable()
    try:
        x, gradient = tensors()
        y = compute(part, x)
        assert [ref.expired() for ref in normed] == [recompute != "none"]
        assert [ref.expired() for ref in inside] == [recompute == "full"]
        # The argument of the second layer.
        assert not streams[0].expired()
        if end == "backward":
            y.backward(gradient)
        elif end == "halves":
            split = SplitBackward((y,), (x,))
            split.input((gradient,))
            assert not normed[-1].expired()
            split.weights()
            del split
        del y
        assert all(ref.expired() for ref in normed + inside + streams)
    finally:
        gc.enable()


def test_without_gradients_it_is_a_plain_call():
    part = middle()
    part.set_recompute("full")
    x, _ = tensors()
    expected = compute(part, x)
    with torch.no_grad():
        y = compute(part, x)
    assert torch.equal(y, expected)
    assert y.grad_fn is None


def test_a_function_of_several_tensors():
    weight = torch.randn(4, 4, requires_grad=True)

    def mix(a, b, scale):
        return (a @ weight).tanh() * scale, (b * a).exp()

    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    gradients = []
    for call in (lambda *given: mix(*given), lambda *given: recomputed(mix, *given)):
        one, other = call(a, b, 2.0)
        gradients.append(torch.autograd.grad(one.sum() + (one * other).sum(), (a, b, weight)))
    assert all(map(torch.equal, *gradients))


def test_every_nth_layer_is_counted_in_the_whole_model():
    assert [recompute_of(3, block) for block in range(7)] == ["none", "none", "full"] * 2 + ["none"]
    assert [recompute_of("attention", block) for block in range(2)] == ["attention"] * 2
