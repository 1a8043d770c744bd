"""Attention to a cache, compared with attention to the whole row."""

from itertools import pairwise

import pytest
import torch

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.cached_attention import LayerCache, attend_cached
from mpillm.models.layers.dense_attention import attend_dense
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
