"""Attention that holds all probabilities: for dropout and soft caps, which fused kernels lack.

Shapes: B sequences, T positions, S positions attended to, H heads, K heads of keys and values, D
width of a head.
"""

import torch
from torch import Tensor

from mpillm.models.layers.dropout import MaskKeys, drop_probabilities


def attend_unfused(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    mask_TS: Tensor | None,
    soft_cap: float = 0.0,
    dropout: float = 0.0,
    keys_B: MaskKeys | None = None,
    bias: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Attend with a soft cap of the scores and dropout of the probabilities; return (B, T, H, D).

    `mask_TS`: true where a position may attend, of any shape that broadcasts to (B, H, T, S); None:
    everywhere. `keys_B`: the layer's keys of dropout masks; None: no dropout. `bias`: added to the
    scores, after the cap. `first_head`: the number of the first head in the whole layer, on which
    dropout depends.
    """
    q_BHTD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    if groups > 1:
        k_BKSD, v_BKSD = (each.repeat_interleave(groups, dim=1) for each in (k_BKSD, v_BKSD))
    # float32: the sum of a softmax has thousands of terms.
    scores_BHTS = ((q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BKSD.transpose(-2, -1)).float()
    if soft_cap:
        scores_BHTS = soft_cap * (scores_BHTS / soft_cap).tanh()
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    if mask_TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_TS, -torch.inf)
    shares_BHTS = scores_BHTS.softmax(-1).to(v_BKSD.dtype)
    shares_BHTS = drop_probabilities(shares_BHTS, dropout, keys_B, first_head)
    return (shares_BHTS @ v_BKSD).transpose(1, 2)
