"""Attention to one block of keys, with the logarithms of its sums, so that blocks can be joined.

Online softmax (Milakov & Gimelshein 2018): the outputs of two blocks are averaged by the sums of
their exponentials. The backward pass of a block takes the output and the sums over all blocks, so
its gradients are exact (Dao 2023, "FlashAttention-2", section 3.1.2).

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, G
heads that share keys and values, D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# torch's fused kernel of `scaled_dot_product_attention` on a CPU. The public function does not
# return the sums.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Piece(NamedTuple):
    """A rectangle of queries and keys that one call of the kernel computes."""

    queries: slice
    keys: slice
    causal: bool = False
    """Whether its queries and keys are the same positions, of which none attends to a later one."""
    mask_TS: Tensor | None = None
    """True where a position attends, of the shape (T, S) or (B, 1, T, S); None: everywhere."""


class JoinedPieces:
    """The attention of queries (B, H, T, D) to all pieces so far, by online softmax."""

    def __init__(self, q_BHTD: Tensor) -> None:
        self._q_BHTD = q_BHTD
        # In float32: 16 bits would be rounded with each piece.
        shape_BTHD = q_BHTD.transpose(1, 2).shape
        self._out_BHTD = torch.zeros(shape_BTHD, dtype=torch.float32).transpose(1, 2)
        self._sums_BHT = torch.full(q_BHTD.shape[:3], -torch.inf)
        self._empty = True

    def add(self, k_BKSD: Tensor, v_BKSD: Tensor, piece: Piece, soft_cap: float = 0.0) -> None:
        """Attend to a piece of these keys and values."""
        rows, keys = piece.queries, piece.keys
        given = self._q_BHTD[:, :, rows], k_BKSD[:, :, keys], v_BKSD[:, :, keys]
        out_BHTD, sums_BHT = attend_piece(*given, piece, soft_cap)
        whole = out_BHTD.shape == self._out_BHTD.shape
        if self._empty and whole:
            self._out_BHTD, self._sums_BHT = out_BHTD.float(), sums_BHT
        else:
            before = self._sums_BHT[:, :, rows]
            share = (sums_BHT - before).sigmoid_()
            if piece.mask_TS is not None:
                # −∞ less −∞: there is nothing yet, and nothing is added.
                share = share.nan_to_num_(0.0)
            self._out_BHTD[:, :, rows].lerp_(out_BHTD.float(), share[..., None])
            self._sums_BHT[:, :, rows] = torch.logaddexp(before, sums_BHT)
        self._empty = False

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the output (B, H, T, D) in the dtype of the queries, and the sums (B, H, T)."""
        return self._out_BHTD.to(self._q_BHTD.dtype), self._sums_BHT


def attend_piece(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, piece: Piece, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D) of a piece, and the logarithms (B, H, T) of its sums, float32.

    A position that attends to nothing has −∞, and an output of zeros.
    """
    if soft_cap or q_BHTD.device.type != "cpu":
        return attend_plainly(q_BHTD, k_BKSD, v_BKSD, piece, soft_cap)
    added = _added(piece.mask_TS, q_BHTD.dtype)
    out_BHTD, sums_BHT = _FLASH(q_BHTD, k_BKSD, v_BKSD, 0.0, piece.causal, attn_mask=added)
    if piece.mask_TS is not None:
        # The kernel gives 0 where a position attends to nothing: a sum of 1.
        sums_BHT = sums_BHT.masked_fill(~_any_key(piece.mask_TS), -torch.inf)
    return out_BHTD, sums_BHT


def piece_gradients(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    out_BHTD: Tensor,
    sums_BHT: Tensor,
    piece: Piece,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a piece's shares of the gradients of q, k and v; `out` and `sums` are over all pieces.

    Each position attends to something in one piece at least.
    """
    given = grad_BHTD, q_BHTD, k_BKSD, v_BKSD, out_BHTD, sums_BHT
    if soft_cap or q_BHTD.device.type != "cpu":
        return plain_gradients(*given, piece, soft_cap)
    added = _added(piece.mask_TS, q_BHTD.dtype)
    found: tuple[Tensor, Tensor, Tensor] = _FLASH_BACKWARD(
        *given, 0.0, piece.causal, attn_mask=added
    )
    return found


def attend_plainly(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, piece: Piece, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute `attend_piece` by matrix products: with soft caps, and as its reference."""
    scores_BKGTS, _ = _scores(q_BHTD, k_BKSD, piece, soft_cap)
    sums_BKGT = scores_BKGTS.logsumexp(-1)
    shares_BKGTS = (scores_BKGTS - sums_BKGT[..., None]).exp()
    # −∞ less −∞: positions that attend to nothing.
    shares_BKGTS = shares_BKGTS.nan_to_num_(0.0)
    out_BKGTD = shares_BKGTS @ v_BKSD[:, :, None].to(shares_BKGTS.dtype)
    return out_BKGTD.flatten(1, 2).to(q_BHTD.dtype), sums_BKGT.flatten(1, 2)


def plain_gradients(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    out_BHTD: Tensor,
    sums_BHT: Tensor,
    piece: Piece,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `piece_gradients` by matrix products."""
    scores_BKGTS, slopes = _scores(q_BHTD, k_BKSD, piece, soft_cap)
    wide, kv_heads = scores_BKGTS.dtype, k_BKSD.shape[1]
    shares_BKGTS = (scores_BKGTS - _grouped(sums_BHT, kv_heads)[..., None]).exp()
    grad, out, q = (_grouped(x, kv_heads).to(wide) for x in (grad_BHTD, out_BHTD, q_BHTD))
    dv_BKSD = (shares_BKGTS.transpose(-2, -1) @ grad).sum(2)
    d_shares = grad @ v_BKSD[:, :, None].transpose(-2, -1).to(wide)
    d_scores = shares_BKGTS * (d_shares - (grad * out).sum(-1, keepdim=True)) * slopes
    d_scores = d_scores * q_BHTD.shape[-1] ** -0.5
    dq_BHTD = (d_scores @ k_BKSD[:, :, None].to(wide)).flatten(1, 2)
    dk_BKSD = (d_scores.transpose(-2, -1) @ q).sum(2)
    return dq_BHTD.to(q_BHTD.dtype), dk_BKSD.to(k_BKSD.dtype), dv_BKSD.to(v_BKSD.dtype)


def _scores(
    q_BHTD: Tensor, k_BKSD: Tensor, piece: Piece, soft_cap: float
) -> tuple[Tensor, Tensor | float]:
    """Return the scores (B, K, G, T, S), −∞ where masked, and the slope of their soft cap."""
    q_BKGTD = _grouped(q_BHTD, k_BKSD.shape[1])
    scores = (q_BKGTD @ k_BKSD[:, :, None].transpose(-2, -1)) * q_BHTD.shape[-1] ** -0.5
    # float32 at least: the sum of a softmax has thousands of terms.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    slopes: Tensor | float = 1.0
    if soft_cap:
        turned = (scores / soft_cap).tanh()
        scores, slopes = soft_cap * turned, 1 - turned.square()
    if piece.causal:
        later_TS = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later_TS, -torch.inf)
    if piece.mask_TS is not None:
        mask = piece.mask_TS if piece.mask_TS.dim() == 2 else piece.mask_TS[:, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores, slopes


def _grouped(x_BHT: Tensor, kv_heads: int) -> Tensor:
    """Part the heads by the keys and values that they share: (B, K, G, …)."""
    return x_BHT.unflatten(1, (kv_heads, -1))  # type: ignore[no-untyped-call, no-any-return]


def _added(mask_TS: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as numbers that are added to scores, which the fused kernel wants."""
    if mask_TS is None:
        return None
    return torch.zeros(mask_TS.shape, dtype=dtype).masked_fill_(~mask_TS, -torch.inf)


def _any_key(mask_TS: Tensor) -> Tensor:
    """Return whether each position attends to any: of the shape (T,) or (B, 1, T)."""
    return mask_TS.any(-1)
