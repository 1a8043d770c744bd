"""Attention of generation: new positions attend to themselves and to those in a cache.

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, D
width of a head.
"""

import torch
from torch import Tensor

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.dense_attention import attend_dense


class LayerCache:
    """Keys and values of one layer for the past positions: two tensors (B, K, context, D)."""

    def __init__(
        self, config: DecoderConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.key_value_heads, config.context, config.head_width)
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
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cache: LayerCache, first: int
) -> Tensor:
    """Store the new positions, which begin at `first`, and attend from them; return (B, T, H, D).

    Keys are cached after rotation: their positions never change.
    """
    k_BSKD, v_BSKD = cache.extend(k_BTKD, v_BTKD, first)
    length, mask_TS = q_BTHD.shape[1], None
    if first and length > 1:
        shape = (length, first + length)
        mask_TS = torch.ones(shape, dtype=torch.bool, device=q_BTHD.device).tril(first)
    return attend_dense(q_BTHD, k_BSKD, v_BSKD, mask_TS)
