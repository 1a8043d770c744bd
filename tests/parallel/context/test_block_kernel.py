"""Attention to blocks, joined, against attention to all keys; the fused kernel, the plain one."""

import pytest
import torch

from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.parallel.context.block_kernel import (
    JoinedPieces,
    Piece,
    attend_piece,
    attend_plainly,
    piece_gradients,
    plain_gradients,
)

LENGTH = 24


def inputs(heads=4, kv_heads=2, dtype=torch.float32):
    """Make q, k, v and the gradient of the output, all (B, H, T, D)."""
    generator = torch.Generator().manual_seed(7)
    counts = heads, kv_heads, kv_heads, heads
    return [torch.randn(2, n, LENGTH, 16, generator=generator).to(dtype) for n in counts]


def pieces(kind):
    """Cut the square of queries and keys; `kind`: how it is masked."""
    half, generator = LENGTH // 2, torch.Generator().manual_seed(3)
    low, high, whole = slice(0, half), slice(half, LENGTH), slice(0, LENGTH)
    if kind == "causal":
        return [Piece(low, low, True), Piece(high, low), Piece(high, high, True)]
    if kind == "all":
        return [Piece(whole, low), Piece(whole, high)]
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) < 0.3
    # Some positions attend to nothing in the first piece, and none to nothing at all.
    mask[:, :, :5, :half], mask[:, :, :, half + 3] = False, True
    return [Piece(whole, part, False, mask[..., part]) for part in (low, high)]


def whole_mask(kind):
    found = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    for piece in pieces(kind):
        given = torch.ones(LENGTH, LENGTH, dtype=torch.bool)[piece.queries, piece.keys]
        given = given.tril() if piece.causal else given
        mask = given if piece.mask_TS is None else piece.mask_TS
        found[:, :, piece.queries, piece.keys] = mask
    return found


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "all", "mask"])
def test_joined_pieces_are_the_attention_to_all_keys(kind, kv_heads, soft_cap):
    q, k, v, grad = inputs(kv_heads=kv_heads)
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    wanted = attend_unfused(*leaves, whole_mask(kind), soft_cap)
    wanted.backward(grad.transpose(1, 2))
    joined = JoinedPieces(q)
    for piece in pieces(kind):
        joined.add(k, v, piece, soft_cap)
    out, sums = joined.result()
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for piece in pieces(kind):
        rows, keys = piece.queries, piece.keys
        own = grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]
        both = out[:, :, rows], sums[:, :, rows]
        shares = piece_gradients(*own, *both, piece, soft_cap)
        for total, share, part in zip(found, shares, (rows, keys, keys), strict=True):
            total[:, :, part] += share
    pairs = zip([out, *found], [wanted, *(leaf.grad for leaf in leaves)], strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.transpose(1, 2), other.detach(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["causal", "all", "mask"])
def test_the_fused_kernel_is_the_plain_one(kind):
    q, k, v, grad = inputs()
    for piece in pieces(kind):
        rows, keys = piece.queries, piece.keys
        own = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        (out, sums), plain = attend_piece(*own, piece), attend_plainly(*own, piece)
        torch.testing.assert_close((out, sums), plain, rtol=1e-4, atol=2e-6)
        if not sums.isfinite().all():
            assert not out[sums.isneginf()].any()
            continue
        given = grad[:, :, rows], *own, out, sums
        one, other = piece_gradients(*given, piece), plain_gradients(*given, piece)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_pieces_of_16_bits_are_joined_in_float32():
    q, k, v, _ = inputs(dtype=torch.bfloat16)
    joined = JoinedPieces(q)
    for piece in pieces("all"):
        joined.add(k, v, piece)
    out, sums = joined.result()
    assert (out.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    exact = attend_plainly(q.float(), k.float(), v.float(), Piece(slice(0, 24), slice(0, 24)))[0]
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
