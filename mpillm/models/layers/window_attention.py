"""Attention within a sliding window (Beltagy et al. 2020): a band of the matrix.

Shapes: B sequences, T positions, S positions attended to, N windows of W positions, H heads, K
heads of keys and values, D width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.layers.dense_attention import attend_dense


def band_mask(
    length: int, first: int, window: int, device: torch.device, causal: bool = True
) -> Tensor:
    """Make the mask (T, first + T) of `length` positions from `first` on: true where it attends.

    `window`, `causal`: see attention.py; a window of 0 has no end.
    """
    mask_TS = torch.ones((length, first + length), dtype=torch.bool, device=device)
    before, after = (window - 1, 0) if causal else (window // 2, window // 2)
    mask_TS = mask_TS.tril(first + after) if causal or window else mask_TS
    return mask_TS.triu(first - before) if window else mask_TS


def attend_window(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int, causal: bool = True
) -> Tensor:
    """Attend within the window; return (B, T, H, D). `window`, `causal`: see attention.py.

    Causal positions are cut into windows, each of which attends to itself and the one before it.
    Time and memory are then linear in T.
    """
    length = q_BTHD.shape[1]
    if not window or length <= (window if causal else window // 2 + 1):
        return attend_dense(q_BTHD, k_BTKD, v_BTKD, causal=causal)
    if not causal:
        mask_TT = band_mask(length, 0, window, q_BTHD.device, causal)
        return attend_dense(q_BTHD, k_BTKD, v_BTKD, mask_TT)
    # Padded at the end, where no real position attends to.
    short = -length % window
    q_BNWHD, k_BNWKD, v_BNWKD = (_cut(x, window, short) for x in (q_BTHD, k_BTKD, v_BTKD))
    # The first window has none before it. Copied: views would keep the whole tensors.
    head_BWHD = attend_dense(q_BNWHD[:, 0].clone(), k_BNWKD[:, 0].clone(), v_BNWKD[:, 0].clone())
    mask_TS = band_mask(window, window, window, q_BTHD.device)
    rest = attend_dense(q_BNWHD[:, 1:].flatten(0, 1), _pairs(k_BNWKD), _pairs(v_BNWKD), mask_TS)
    rest_BTHD = rest.view(len(head_BWHD), -1, *head_BWHD.shape[2:])
    return torch.cat([head_BWHD, rest_BTHD], dim=1)[:, :length]


def _cut(x_BTHD: Tensor, window: int, short: int) -> Tensor:
    """Cut the positions, and `short` padded ones, into N windows of W: (B, N, W, H, D)."""
    padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, short)) if short else x_BTHD
    return padded.unflatten(1, (-1, window))  # type: ignore[no-untyped-call, no-any-return]


def _pairs(x_BNWKD: Tensor) -> Tensor:
    """Join each window with the one before it: (B · (N − 1), 2 · W, K, D)."""
    return torch.cat([x_BNWKD[:, :-1], x_BNWKD[:, 1:]], dim=2).flatten(0, 1)
