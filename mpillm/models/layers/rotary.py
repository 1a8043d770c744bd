"""Rotary positions (Su et al. 2021): pairs of features turn by angles linear in position.

Shapes: B sequences, T positions, H heads, D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpillm.models.decoder import DecoderConfig


class Rotation(NamedTuple):
    """The rotation of T positions in a row, for all layers of a forward pass."""

    cos_T1D: Tensor
    sin_T1D: Tensor


class Rotary(nn.Module):
    """The table of all positions' angles."""

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

    def forward(self, first: int, length: int, dtype: torch.dtype) -> Rotation:
        """Return the rotation of `length` positions from `first` on."""
        last = first + length
        cos_TD, sin_TD = self.cos_TD[first:last].to(dtype), self.sin_TD[first:last].to(dtype)
        return Rotation(cos_TD[:, None], sin_TD[:, None])


def rotate(x_BTHD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the features of each head."""
    # Autocast's products are in 16 bits, and the stream that the rotation is made for is not.
    cos_T1D, sin_T1D = (table.to(x_BTHD.dtype) for table in rotation)
    left, right = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_T1D + torch.cat([-right, left], dim=-1) * sin_T1D
