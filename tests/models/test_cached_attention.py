"""Attention to a cache, compared with attention to the whole row."""

from itertools import pairwise

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.cached_attention import LayerCache, LayeredCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.window_attention import attend_window
from tests.models.attention_inputs import make_qkv


@pytest.mark.parametrize("edges", [(0, 12), (0, 5, 6, 7, 12), (0, 1, 12)], ids=str)
def test_pieces_are_the_whole(edges):
    q, k, v, _ = make_qkv(2, 12, kv_heads=2)
    config = DecoderConfig(width=64, heads=4, kv_heads=2, context=16)
    cache = LayerCache(config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [
            attend_cached(q[:, a:b], k[:, a:b], v[:, a:b], cache, a) for a, b in pairwise(edges)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), attend_dense(q, k, v))


def test_a_cache_grows_with_its_text():
    q, k, v, _ = make_qkv(2, 200, kv_heads=2)
    config = DecoderConfig(width=q.shape[2] * q.shape[3], heads=q.shape[2], kv_heads=2, context=300)
    cache = LayerCache(config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [
            attend_cached(q[:, a:b], k[:, a:b], v[:, a:b], cache, a)
            for a, b in pairwise((0, 3, 70, 71, 199, 200))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), attend_dense(q, k, v))


@pytest.mark.parametrize("window", [0, 3])
def test_unequal_rows_attend_to_their_own_positions(window):
    """Rows of 2 and 5 positions, then of both another 3; then the second row twice."""
    q, k, v, _ = make_qkv(2, 8, kv_heads=2)
    config = DecoderConfig(width=64, heads=4, kv_heads=2, context=16)
    cache = LayeredCache([LayerCache(config, 2, torch.device("cpu"), torch.float32)])
    lengths = torch.tensor([2, 5])

    def attend(rows, *spans):
        """Attend from positions of each row, which has its own."""
        parts = [
            torch.stack([x[r, a:b] for r, (a, b) in zip(rows, spans, strict=True)])
            for x in (q, k, v)
        ]
        found = attend_cached(*parts, cache.layers[0], cache.length, window)
        cache.grow(found.shape[1])
        return found

    with torch.no_grad():
        alone = [attend_window(q[r : r + 1], k[r : r + 1], v[r : r + 1], window) for r in (0, 1)]
        attend((0, 1), (0, 5), (0, 5))
        cache.cut(lengths)
        found = attend((0, 1), (2, 4), (5, 7))
        torch.testing.assert_close(found[0], alone[0][0, 2:4])
        torch.testing.assert_close(found[1], alone[1][0, 5:7])
        cache.select(torch.tensor([1, 1]))
        assert cache.lengths_B is None
        found = attend((1, 1), (7, 8), (7, 8))
        torch.testing.assert_close(found[:, 0], alone[1][0, 7].expand(2, -1, -1))
