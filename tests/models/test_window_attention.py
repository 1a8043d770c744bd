"""Attention within a window, compared with a dense mask."""

from itertools import pairwise

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.attention import Pattern, attend
from mpillm.models.layers.cached_attention import LayerCache
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.models.layers.window_attention import attend_window, band_mask
from tests.models.attention_inputs import compute, make_qkv, number_documents, random_lengths


def dense_band(length, window):
    """Make the mask from its definition."""
    rows = [[0 <= t - s < window for s in range(length)] for t in range(length)]
    return torch.tensor(rows)


@pytest.mark.parametrize("window", [1, 3, 4, 8, 15, 16, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_windows_are_a_band_of_the_matrix(window, kv_heads):
    given = make_qkv(3, 16, kv_heads=kv_heads)
    found = compute(lambda *qkv: attend_window(*qkv, window), *given)
    wanted = compute(lambda *qkv: attend_dense(*qkv, dense_band(16, window)), *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 24])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 9, 16, 60])
def test_windows_to_both_sides_are_a_band_of_the_matrix(window, length):
    rows = [[abs(t - s) <= window // 2 for s in range(length)] for t in range(length)]
    given = make_qkv(2, length, kv_heads=2)
    found = compute(lambda *qkv: attend_window(*qkv, window, causal=False), *given)
    wanted = compute(lambda *qkv: attend_dense(*qkv, torch.tensor(rows)), *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_windows_to_both_sides_keep_no_matrix_of_positions():
    *qkv, _ = make_qkv(1, 512, heads=1, kv_heads=1)
    shapes = []

    def keep(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend_window(*qkv, 16, causal=False)
    assert max(shape[-1] for shape in shapes) <= 24


def test_no_window_is_causal_attention_bitwise():
    *qkv, _ = make_qkv(2, 9)
    assert torch.equal(attend(*qkv), attend_dense(*qkv))
    assert torch.equal(attend(*qkv, Pattern(window=9)), attend_dense(*qkv))


@pytest.mark.parametrize("first", [0, 2, 7])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_the_mask_of_later_positions_is_a_part_of_the_whole(first, window):
    whole = dense_band(9, window or 9)
    assert torch.equal(band_mask(9 - first, first, window, torch.device("cpu")), whole[first:])


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("window", [3, 5])
def test_documents_and_windows_are_both_kept_apart(window, soft_cap):
    rows = [random_lengths(24, seed) for seed in range(3)]
    given, spans = make_qkv(3, 24, kv_heads=2), DocumentSpans(number_documents(*rows))
    mask = spans.causal_mask & dense_band(24, window)
    pattern = Pattern(window=window, soft_cap=soft_cap)
    found = compute(lambda *qkv: attend(*qkv, pattern, spans), *given)
    if soft_cap:
        keys = torch.arange(3)
        # The way of dropout: of all probabilities but 2⁻¹⁶.
        near = attend(*given[:3], pattern._replace(dropout=1e-9), spans, keys_B=keys)
        assert torch.isclose(near, found[0], rtol=1e-3, atol=1e-4).float().mean() > 0.9
        return
    wanted = compute(lambda *qkv: attend_dense(*qkv, mask), *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("edges", [(0, 12), (0, 5, 6, 7, 12), (0, 1, 2, 3, 4, 5, 12)], ids=str)
def test_a_cache_keeps_the_window(edges, soft_cap):
    q, k, v, _ = make_qkv(2, 12, kv_heads=2)
    config = DecoderConfig(width=64, heads=4, kv_heads=2, context=16)
    cache = LayerCache(config, 2, torch.device("cpu"), torch.float32)
    pattern = Pattern(window=3, soft_cap=soft_cap)
    with torch.no_grad():
        pieces = [
            attend(q[:, a:b], k[:, a:b], v[:, a:b], pattern, cache=cache, first=a)
            for a, b in pairwise(edges)
        ]
        whole = attend(q, k, v, pattern)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
