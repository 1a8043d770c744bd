"""Rotary positions (Su et al. 2021): pairs of features turn by angles linear in position.

Shapes: B sequences, T positions, H heads, D width of a head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpillm.models.block_settings import BlockSettings

# YaRN (Peng et al. 2023, section 3.2): angles with more than 32 turns in the original context stay
# as they are, those with less than 1 are scaled.
YARN_TURNS = 32.0, 1.0


class Rotation(NamedTuple):
    """The rotation of T positions in a row, for all layers of a forward pass."""

    cos_T1D: Tensor
    sin_T1D: Tensor


class Rotary(nn.Module):
    """The table of all positions' angles; `windowed`: of the layers with a window."""

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, config: BlockSettings, windowed: bool = False) -> None:
        super().__init__()
        half = config.rotary_features // 2
        theta = config.window_rope_theta if windowed else config.rope_theta
        # Computed in float64 on the CPU: the same bits on every device.
        cpu, device = torch.device("cpu"), torch.get_default_device()
        frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=cpu) / half)
        if not windowed:
            frequencies = _scaled(frequencies, config)
        angles = torch.outer(
            torch.arange(config.context, dtype=torch.float64, device=cpu), frequencies
        )
        angles_TD = torch.cat([angles, angles], dim=-1)
        length = 1.0 if windowed else _length(config)
        cos_TD, sin_TD = angles_TD.cos() * length, angles_TD.sin() * length
        self.register_buffer("cos_TD", cos_TD.float().to(device), persistent=False)
        self.register_buffer("sin_TD", sin_TD.float().to(device), persistent=False)

    def forward(
        self, first: int, length: int, dtype: torch.dtype, positions_T: Tensor | None = None
    ) -> Rotation:
        """Return the rotation of `length` positions from `first` on; or of `positions_T`, (T,) or
        of each row (B, T).
        """
        tables = self.cos_TD, self.sin_TD
        if positions_T is None:
            cos_TD, sin_TD = (table[first : first + length].to(dtype) for table in tables)
        else:
            cos_TD, sin_TD = (table[positions_T].to(dtype) for table in tables)
        return Rotation(cos_TD.unsqueeze(-2), sin_TD.unsqueeze(-2))


def rotate(x_BTHD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the features of each head: the first ones, as many as the tables have."""
    # Autocast's products are in 16 bits, and the stream that the rotation is made for is not.
    cos_T1D, sin_T1D = (table.to(x_BTHD.dtype) for table in rotation)
    turned = cos_T1D.shape[-1]
    if turned < x_BTHD.shape[-1]:
        kept_BTHD = x_BTHD[..., turned:]
        return torch.cat([rotate(x_BTHD[..., :turned], rotation), kept_BTHD], dim=-1)
    left, right = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_T1D + torch.cat([-right, left], dim=-1) * sin_T1D


def _scaled(frequencies: Tensor, config: BlockSettings) -> Tensor:
    """Scale the angle a position of each pair as the settings say."""
    if config.rope_scaling == "none":
        return frequencies
    slowed = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    original = config.rope_original_context or config.context / config.rope_factor
    if config.rope_scaling == "llama3":
        # Grattafiori et al. 2024, as released: the share that stays is linear in the turns.
        turns = original * frequencies / (2 * math.pi)
        kept = (turns - config.rope_low) / (config.rope_high - config.rope_low)
    else:
        kept = 1 - _yarn_ramp(len(frequencies), original, config.rope_theta)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * slowed


def _yarn_ramp(half: int, original: float, theta: float) -> Tensor:
    """Return how far each pair is between the one of most turns and the one of least."""
    pairs = (
        half * math.log(original / (turns * 2 * math.pi)) / math.log(theta) for turns in YARN_TURNS
    )
    low, high = next(pairs), next(pairs)
    first, last = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
    numbers = torch.arange(half, dtype=torch.float64, device="cpu")
    return (numbers - first) / max(last - first, 0.001)


def _length(config: BlockSettings) -> float:
    """Return the factor on queries and keys that YaRN adds to its scaling (its equation 22)."""
    if config.rope_scaling != "yarn" or config.rope_factor <= 1:
        return 1.0
    return 0.1 * math.log(config.rope_factor) + 1.0
