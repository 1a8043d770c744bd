"""Sinusoidal positions (Vaswani et al. 2017): a constant table that is added to the embedding.

Shapes: T positions, C width.
"""

import torch
from torch import Tensor


def sinusoidal_positions(length: int, width: int, ends: bool = False) -> Tensor:
    """Make the table (T, C): sines in the first half of the features, cosines in the second.

    The angles a position are powers of 1/10000, from 1 on. `ends`: the last is 1/10000 itself, as
    in Whisper; without, it is the next one that would be.
    """
    # Computed in float64 on the CPU: the same bits on every device.
    cpu, device = torch.device("cpu"), torch.get_default_device()
    half = width // 2
    pairs = torch.arange(half, dtype=torch.float64, device=cpu)
    frequencies = 10000.0 ** (-pairs / (half - ends))
    positions = torch.arange(length, dtype=torch.float64, device=cpu)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float().to(device)
