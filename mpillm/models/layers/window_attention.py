"""Attention within a sliding window (Beltagy et al. 2020): a band of the matrix.

Shapes: B sequences, T positions, S positions attended to, N windows of W positions, M windows of
all sequences, H heads, K heads of keys and values, D width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.layers.dense_attention import attend_dense


def band_mask(
    length: int,
    first: int,
    window: int,
    device: torch.device,
    causal: bool = True,
    after: int = 0,
) -> Tensor:
    """Make the mask (T, first + T + after) of `length` positions from `first` on: true where it
    attends.

    `window`, `causal`: see attention.py; a window of 0 has no end.
    """
    mask_TS = torch.ones((length, first + length + after), dtype=torch.bool, device=device)
    back, ahead = (window - 1, 0) if causal else (window // 2, window // 2)
    mask_TS = mask_TS.tril(first + ahead) if causal or window else mask_TS
    return mask_TS.triu(first - back) if window else mask_TS


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
        return _attend_both_sides(q_BTHD, k_BTKD, v_BTKD, window)
    # Padded at the end, where no real position attends to.
    short = -length % window
    q_BNWHD, k_BNWKD, v_BNWKD = (_cut(x, window, short) for x in (q_BTHD, k_BTKD, v_BTKD))
    # The first window has none before it. Copied: views would keep the whole tensors.
    head_BWHD = attend_dense(q_BNWHD[:, 0].clone(), k_BNWKD[:, 0].clone(), v_BNWKD[:, 0].clone())
    mask_TS = band_mask(window, window, window, q_BTHD.device)
    rest = attend_dense(q_BNWHD[:, 1:].flatten(0, 1), _pairs(k_BNWKD), _pairs(v_BNWKD), mask_TS)
    rest_BTHD = rest.view(len(head_BWHD), -1, *head_BWHD.shape[2:])
    return torch.cat([head_BWHD, rest_BTHD], dim=1)[:, :length]


def _attend_both_sides(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Attend to half a window on each side; return (B, T, H, D).

    Positions are cut into halves W, each of which attends to itself and its neighbours. The first
    has none before it. The last whole one is computed with the positions after it.
    """
    length, size = q_BTHD.shape[1], max(window // 2, 1)
    whole = length // size

    def mask(queries: int, first: int, after: int) -> Tensor:
        return band_mask(queries, first, window, q_BTHD.device, causal=False, after=after)

    if whole <= 3:
        return attend_dense(q_BTHD, k_BTKD, v_BTKD, mask(length, 0, 0))
    last = (whole - 1) * size
    # Copied: views would keep the whole tensors.
    k_head, v_head = (x[:, : 2 * size].clone() for x in (k_BTKD, v_BTKD))
    k_tail, v_tail = (x[:, last - size :].clone() for x in (k_BTKD, v_BTKD))
    k_MSKD, v_MSKD = (_triples(_cut(x[:, : whole * size], size, 0)) for x in (k_BTKD, v_BTKD))
    q_MWHD = _cut(q_BTHD[:, size:last], size, 0).flatten(0, 1)
    rest = attend_dense(q_MWHD, k_MSKD, v_MSKD, mask(size, size, size))
    found = (
        attend_dense(q_BTHD[:, :size].clone(), k_head, v_head, mask(size, 0, size)),
        rest.reshape(len(q_BTHD), -1, *rest.shape[2:]),
        attend_dense(q_BTHD[:, last:].clone(), k_tail, v_tail, mask(length - last, size, 0)),
    )
    return torch.cat(found, dim=1)


def _cut(x_BTHD: Tensor, window: int, short: int) -> Tensor:
    """Cut the positions, and `short` padded ones, into N windows of W: (B, N, W, H, D)."""
    padded = F.pad(x_BTHD, (0, 0, 0, 0, 0, short)) if short else x_BTHD
    return padded.unflatten(1, (-1, window))  # type: ignore[no-untyped-call, no-any-return]


def _pairs(x_BNWKD: Tensor) -> Tensor:
    """Join each window with the one before it: (B · (N − 1), 2 · W, K, D)."""
    return torch.cat([x_BNWKD[:, :-1], x_BNWKD[:, 1:]], dim=2).flatten(0, 1)


def _triples(x_BNWKD: Tensor) -> Tensor:
    """Join each window with those on its sides: (B · (N − 2), 3 · W, K, D)."""
    return torch.cat([x_BNWKD[:, :-2], x_BNWKD[:, 1:-1], x_BNWKD[:, 2:]], dim=2).flatten(0, 1)
