"""Causal self-attention with rotary positions, grouped heads and a key/value cache.

Shapes: B sequences, T positions, S positions attended to, C width, H heads, K heads of keys and
values, D width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.dropout import attend_with_dropout


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): rotate pairs of features by angles linear in position."""

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        half = config.head_width // 2
        # Computed in float64 on the CPU: the same bits on every device.
        cpu, device = torch.device("cpu"), torch.get_default_device()
        frequencies = config.rope_theta ** (
            -torch.arange(half, dtype=torch.float64, device=cpu) / half
        )
        angles = torch.outer(
            torch.arange(config.context, dtype=torch.float64, device=cpu), frequencies
        )
        angles_TD = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos_TD", angles_TD.cos().float().to(device), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin().float().to(device), persistent=False)

    def forward(self, x_BHTD: Tensor, first: int) -> Tensor:
        """Rotate `x_BHTD`, whose first position is `first`."""
        last = first + x_BHTD.shape[-2]
        cos_TD, sin_TD = (
            self.cos_TD[first:last].to(x_BHTD.dtype),
            self.sin_TD[first:last].to(x_BHTD.dtype),
        )
        left, right = x_BHTD.chunk(2, dim=-1)
        return x_BHTD * cos_TD + torch.cat([-right, left], dim=-1) * sin_TD


class LayerCache:
    """Keys and values of one layer for the past positions: two tensors (B, K, context, D)."""

    def __init__(
        self, config: DecoderConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.key_value_heads, config.context, config.head_width)
        self._k_BKSD = torch.zeros(shape, device=device, dtype=dtype)
        self._v_BKSD = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, k_BKTD: Tensor, v_BKTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Store T new positions from `first` on and return all positions up to the last."""
        last = first + k_BKTD.shape[-2]
        self._k_BKSD[:, :, first:last] = k_BKTD
        self._v_BKSD[:, :, first:last] = v_BKTD
        return self._k_BKSD[:, :, :last], self._v_BKSD[:, :, :last]


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023), by scaled_dot_product_attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        key_value = config.key_value_heads * config.head_width
        self.heads, self.kv_heads, self.head_width = (
            config.heads,
            config.key_value_heads,
            config.head_width,
        )
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, key_value, bias=config.bias)
        self.value = nn.Linear(config.width, key_value, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        x_BTC: Tensor,
        rotary: Rotary | None,
        mask_TS: Tensor | None,
        cache: LayerCache | None,
        first: int,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """Attend from position `first`; `mask_TS` (true: may attend) replaces the causal mask.

        `keys_B`: the layer's keys of dropout masks; None outside of training.
        """
        batch, length, width = x_BTC.shape
        q_BHTD = self.query(x_BTC).view(batch, length, self.heads, self.head_width).transpose(1, 2)
        k_BKTD = self.key(x_BTC).view(batch, length, self.kv_heads, self.head_width).transpose(1, 2)
        v_BKTD = (
            self.value(x_BTC).view(batch, length, self.kv_heads, self.head_width).transpose(1, 2)
        )
        if rotary is not None:
            q_BHTD, k_BKTD = rotary(q_BHTD, first), rotary(k_BKTD, first)
        # Keys are cached after rotation: their positions never change.
        if cache is not None:
            k_BKTD, v_BKTD = cache.extend(k_BKTD, v_BKTD, first)
        if self.dropout and keys_B is not None:
            a_BHTD = attend_with_dropout(q_BHTD, k_BKTD, v_BKTD, mask_TS, self.dropout, keys_B)
        else:
            a_BHTD = F.scaled_dot_product_attention(
                q_BHTD,
                k_BKTD,
                v_BKTD,
                attn_mask=mask_TS,
                is_causal=mask_TS is None and length > 1,
                enable_gqa=self.heads != self.kv_heads,
            )
        y_BTC: Tensor = self.output(a_BHTD.transpose(1, 2).reshape(batch, length, width))
        return y_BTC
