"""The heads of an encoder: of a vocabulary, of classes, of spans, or none.

Shapes: B sequences, T positions, C width, N classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.encoder_settings import EncoderSettings

POOLINGS = ("first", "mean", "last")


def pool(x_BTC: Tensor, pooling: str, lengths_B: Tensor | None) -> Tensor:
    """Return (B, C): the `first` or the `last` position of each row, or the `mean` of all.

    `lengths_B`: the real positions of each row; None: all are.
    """
    length = x_BTC.shape[1]
    # Copied: a view would keep all positions.
    if pooling == "first":
        return x_BTC[:, 0].clone()
    if lengths_B is None:
        return x_BTC[:, -1].clone() if pooling == "last" else x_BTC.mean(1)
    # A row without positions has its first one, of padding.
    lengths_B = lengths_B.to(x_BTC.device).clamp(min=1)
    if pooling == "last":
        return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), lengths_B - 1]
    real_BT1 = torch.arange(length, device=x_BTC.device)[:, None] < lengths_B[:, None, None]
    return (x_BTC * real_BT1).sum(1) / lengths_B[:, None]


def activate(x: Tensor, config: EncoderSettings) -> Tensor:
    """Apply the activation of the layer ahead of the head: the feed-forward's GELU, or SiLU."""
    if config.head_layer == "tanh":
        return x.tanh()
    if config.activation == "swiglu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if config.activation.endswith("exact") else "tanh")
