"""Attention that holds its probabilities, compared with the fused one."""

import pytest
import torch

from mpillm.models.layers.dense_attention import attend_dense
from mpillm.models.layers.unfused_attention import attend_unfused
from tests.models.attention_inputs import compute, make_qkv, number_documents

KEYS = torch.arange(3)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_without_dropout_and_cap_it_is_the_fused_one(kv_heads, masked):
    given = make_qkv(3, 9, kv_heads=kv_heads)
    document = number_documents([4, 5])[0] if masked else torch.zeros(9)
    mask = (document[:, None] == document).tril()
    fused = compute(lambda *qkv: attend_dense(*qkv, mask), *given)
    plain = compute(lambda *qkv: attend_unfused(*qkv, mask), *given)
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        drawn = [attend_unfused(*given[:3], mask, dropout=0.3, keys_B=KEYS + n) for n in range(200)]
    torch.testing.assert_close(torch.stack(drawn).mean(0), fused[0].detach(), rtol=0.3, atol=0.3)


def test_a_soft_cap_bounds_the_scores():
    q, k, v, _ = make_qkv(2, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    found = attend_unfused(q, k, v, mask, soft_cap=0.5)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 4
    shares = (0.5 * torch.tanh(scores / 0.5)).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bhts,bshd->bthd", shares, v))
    # So large that it changes nothing.
    wide = attend_unfused(q, k, v, mask, soft_cap=1e4)
    torch.testing.assert_close(wide, attend_dense(q, k, v), rtol=1e-4, atol=1e-5)
