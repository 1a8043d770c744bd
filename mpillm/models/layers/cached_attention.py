"""Attention of generation: new positions attend to themselves and to those in a cache.

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, D
width of a head.
"""

import torch
from torch import Tensor

from mpillm.models.block_settings import BlockSettings
from mpillm.models.layers.dense_attention import attend_dense, biased_mask
from mpillm.models.layers.unfused_attention import attend_unfused
from mpillm.models.layers.window_attention import attend_window, band_mask


class LayerCache:
    """Keys and values of one layer for the past positions: two tensors (B, K, context, D)."""

    def __init__(
        self, config: BlockSettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.key_value_heads, config.context, config.head_features)
        # By head: a new position reads the keys of a head in one piece.
        self._k_BKSD = torch.zeros(shape, device=device, dtype=dtype)
        self._v_BKSD = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, k_BTKD: Tensor, v_BTKD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Store T new positions from `first` on and return all positions, (B, S, K, D)."""
        last = first + k_BTKD.shape[1]
        self._k_BKSD[:, :, first:last] = k_BTKD.transpose(1, 2)
        self._v_BKSD[:, :, first:last] = v_BTKD.transpose(1, 2)
        k_BKSD, v_BKSD = self._k_BKSD[:, :, :last], self._v_BKSD[:, :, :last]
        return k_BKSD.transpose(1, 2), v_BKSD.transpose(1, 2)


def attend_cached(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    cache: LayerCache,
    first: int,
    window: int = 0,
    soft_cap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Store the new positions, which begin at `first`, and attend from them; return (B, T, H, D).

    Keys are cached after rotation: their positions never change. The rest: see attention.py.
    """
    k_BSKD, v_BSKD = cache.extend(k_BTKD, v_BTKD, first)
    length = q_BTHD.shape[1]
    if soft_cap:
        mask_TS = band_mask(length, first, window, q_BTHD.device)
        return attend_unfused(q_BTHD, k_BSKD, v_BSKD, mask_TS, soft_cap, bias=bias)
    if bias is not None:
        mask_TS = band_mask(length, first, window, q_BTHD.device)
        return attend_dense(q_BTHD, k_BSKD, v_BSKD, biased_mask(bias.to(q_BTHD.dtype), mask_TS))
    if not first:
        return attend_window(q_BTHD, k_BSKD, v_BSKD, window)
    if length == 1:
        # The slice of one position is its window; -0 is all.
        return attend_dense(q_BTHD, k_BSKD[:, -window:], v_BSKD[:, -window:])
    return attend_dense(q_BTHD, k_BSKD, v_BSKD, band_mask(length, first, window, q_BTHD.device))
