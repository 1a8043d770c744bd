"""Attention over whole rows: the reference of all other kernels.

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, D
width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_dense(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    mask_TS: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attend by torch's scaled_dot_product_attention; return (B, T, H, D).

    `mask_TS`: true where a position may attend, or numbers that are added to the scores; of any
    shape that broadcasts to (B, H, T, S). None: as `causal` says, which needs no matrix.
    """
    a_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask_TS,
        # A single position attends to all: torch has a faster kernel for it without the flag.
        is_causal=causal and mask_TS is None and q_BTHD.shape[1] > 1,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
    )
    return a_BHTD.transpose(1, 2)


def biased_mask(bias: Tensor, mask_TS: Tensor | None) -> Tensor:
    """Return the `bias` of the scores, −∞ where the mask is false, of 4 dims; both broadcast."""
    # With 3 dims torch has no fused kernel on a CPU, and holds the scores of all pairs.
    bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
    return bias if mask_TS is None else bias.masked_fill(~mask_TS, -torch.inf)
