"""The reference kernel, compared with the sum written out."""

import pytest
import torch

from mpillm.models.layers.dense_attention import attend_dense
from tests.models.attention_inputs import make_qkv


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_it_is_softmax_of_scores(kv_heads, masked):
    q, k, v, _ = make_qkv(2, 9, kv_heads=kv_heads)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    if masked:
        mask[5:, :5] = False
    found = attend_dense(q, k, v, mask if masked else None)
    for head in range(4):
        shared = head // (4 // kv_heads)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / 4
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(found[:, :, head], shares @ v[:, :, shared])
