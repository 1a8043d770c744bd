"""Attention by torch's kernel for variable lengths, compared with the dense mask."""

from itertools import pairwise

import pytest
import torch

from mpillm.models.layers import varlen_attention
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.varlen_attention import attend_varlen, takes_spans
from mpillm.models.layers.window_attention import band_mask
from tests.models.attention_inputs import compute, make_qkv, number_documents, random_lengths

ROWS = [random_lengths(96, seed) for seed in range(3)]


def plain_kernel(q, k, v, edges_q, edges_k, longest_q, longest_k, *, window_size, enable_gqa):
    """Compute what torch documents of `varlen_attn`, sequence by sequence."""
    assert edges_q.dtype == torch.int32
    assert edges_q.tolist() == edges_k.tolist()
    assert longest_q == longest_k == int(edges_q.diff().max())
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    edges = edges_q.tolist()
    return torch.cat(
        [attend_dense(*(x[None, a:b] for x in (q, k, v)))[0] for a, b in pairwise(edges)]
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_is_called_as_torch_documents_it(monkeypatch, kv_heads):
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: plain_kernel)
    spans, given = DocumentSpans(number_documents(*ROWS)), make_qkv(3, 96, kv_heads=kv_heads)
    found = compute(lambda *qkv: attend_varlen(*qkv, spans), *given)
    expected = compute(lambda *qkv: attend_dense(*qkv, spans.causal_mask), *given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "side"), [(0, -1), (1, 0), (2, 1), (128, 64)])
def test_a_window_to_both_sides_has_half_of_it_on_each(monkeypatch, window, side):
    def kernel(q, k, v, *edges, window_size, enable_gqa):
        assert window_size == (side, side)
        return q

    monkeypatch.setattr(varlen_attention, "_kernel", lambda: kernel)
    q, k, v, _ = make_qkv(3, 96)
    attend_varlen(q, k, v, DocumentSpans(number_documents(*ROWS)), window, causal=False)


def test_a_processor_does_without():
    assert not takes_spans(make_qkv(1, 4, dtype=torch.bfloat16)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_gpu_gives_the_results_of_the_dense_mask(kv_heads, window):
    gpu = torch.device("cuda")
    spans = DocumentSpans(number_documents(*ROWS), gpu)
    *qkv, grad = make_qkv(3, 96, kv_heads=kv_heads, width=64, dtype=torch.bfloat16)
    qkv, grad = [x.detach().to(gpu).requires_grad_() for x in qkv], grad.to(gpu)
    if not takes_spans(qkv[0]):
        pytest.skip("torch has no such kernel here")
    found = compute(lambda *given: attend_varlen(*given, spans, window), *qkv, grad)
    mask = spans.causal_mask & band_mask(96, 0, window, gpu)
    expected = compute(lambda *given: attend_dense(*given, mask), *qkv, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
