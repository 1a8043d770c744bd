"""The entry to the attention kernels: it takes the right one, and training losses agree."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers import attention
from mpillm.models.layers.attention import CAUSAL, Pattern, attend
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.part_module import create
from mpillm.models.spec import Part
from mpillm.parallel.pipeline.split_backward import SplitBackward
from mpillm.tasks.causal_lm import CausalLM
from tests.models.attention_inputs import compute, make_qkv, number_documents, random_lengths

ROWS = [random_lengths(32, seed) for seed in range(3)]
KINDS = [
    {"kv_heads": 2},
    {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
]


def dense(q, k, v, spans):
    return attend_dense(q, k, v, spans.causal_mask)


def dense_call(calls, *given):
    """Count a call in place of `attend_spans`."""
    calls.append(1)
    return dense(*given[:4])


def train(kind, recompute="none"):
    """Take five steps on documents; return the losses."""
    config = DecoderConfig(layers=2, width=32, heads=4, context=32, vocab_size=50, **kind)
    model, task = create(config, 1), CausalLM()
    model.set_recompute(recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(0))
    raw = {"tokens": tokens.numpy(), "documents": number_documents(*([*row, 1] for row in ROWS))}
    raw["documents"] = raw["documents"].numpy()
    losses = []
    for _ in range(5):
        fields = task.fields(raw)
        loss = task.objective_sum(model.forward_part(fields, ()).outputs, fields) / 96
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_losses_are_those_of_the_dense_mask(kind, monkeypatch):
    found = train(kind)
    assert [train(kind, recompute) for recompute in ("attention", "full")] == [found, found]
    calls = []
    monkeypatch.setattr(attention, "attend_spans", partial(dense_call, calls))
    assert train(kind) == pytest.approx(found, rel=1e-5)
    assert len(calls) == 10
    assert found[-1] < found[0]


def test_two_halves_of_a_backward_pass_give_the_bits_of_one():
    config = DecoderConfig(layers=4, width=32, heads=4, kv_heads=2, context=32, vocab_size=50)
    fields = {"documents": number_documents(*ROWS)}
    found = []
    for halves in (False, True):
        part = create(config, 1, part=Part(1, 3))
        generator = torch.Generator().manual_seed(5)
        x, grad = (torch.randn(3, 32, 32, generator=generator) for _ in range(2))
        x.requires_grad_()
        (y,) = part.forward_part(fields, (x,)).outputs
        if halves:
            split = SplitBackward((y,), (x,))
            (own,) = split.input((grad,))
            assert all(weight.grad is None for weight in part.parameters())
            split.weights()
        else:
            y.backward(grad)
            own = x.grad
        found.append([own, *(weight.grad for weight in part.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_dropout_takes_its_own_path_within_documents():
    *qkv, _ = make_qkv(3, 32)
    spans, keys = DocumentSpans(number_documents(*ROWS)), torch.tensor([1, 2, 3])
    # So small that nearly all is kept: the dense mask's result, but for a few values.
    found = attend(*qkv, Pattern(dropout=1e-6), spans, keys_B=keys)
    near = torch.isclose(found, dense(*qkv, spans), rtol=1e-3, atol=1e-4)
    assert near.float().mean() > 0.9
    assert torch.equal(attend(*qkv, Pattern(dropout=0.5), spans), attend(*qkv, CAUSAL, spans))


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("window", [0, 4, 5, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_to_both_sides_is_that_of_a_mask(documents, window, soft_cap):
    given = make_qkv(3, 32, kv_heads=2)
    spans = DocumentSpans(number_documents(*ROWS)) if documents else None
    places = torch.arange(32)
    near = (places[:, None] - places).abs() <= (window // 2 if window else 32)
    mask = near & spans.mask if spans else near
    pattern = Pattern(causal=False, window=window, soft_cap=soft_cap)
    found = compute(lambda *qkv: attend(*qkv, pattern, spans), *given)
    wanted = compute(
        lambda *qkv: attend_unfused(*qkv, mask.broadcast_to(3, 1, 32, 32), soft_cap), *given
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [False, True])
def test_a_bias_is_added_to_the_scores(documents, causal):
    given = make_qkv(3, 32, kv_heads=2)
    spans = DocumentSpans(number_documents(*ROWS)) if documents else None
    bias = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1))
    pattern = Pattern(causal)
    found = compute(lambda *qkv: attend(*qkv, pattern, spans, bias=bias), *given)
    # A cap that is no cap: the path that holds all scores.
    capped = Pattern(causal, soft_cap=1e4)
    wanted = compute(lambda *qkv: attend(*qkv, capped, spans, bias=bias), *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = attend(*given[:3], pattern, spans)
    assert not torch.allclose(found[0], plain, atol=1e-2)


def test_one_file_calls_the_fused_kernel_and_few_enter_the_others():
    house = Path(attention.__file__).parents[2]
    texts = {path.name: path.read_text(encoding="utf-8") for path in house.rglob("*.py")}

    def users(pattern):
        return {name for name, text in texts.items() if re.search(pattern, text)}

    assert users(r"scaled_dot_product_attention\(") == {"dense_attention.py"}
    # Ranks that exchange heads enter as a whole model does, each with its own heads.
    assert users(r"(?<!def )\battend\(") == {"attention.py", "head_exchange.py"}
    kernels = {
        "cached_attention.py",
        "paged_attention.py",
        "span_attention.py",
        "window_attention.py",
    }
    assert users(r"import attend_\w+") == {"attention.py", *kernels}
