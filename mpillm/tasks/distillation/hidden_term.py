"""The difference between outputs of layers of a student and of its teacher.

Mean squared difference after a learnt projection (Romero et al. 2014, "FitNets"; Jiao et al. 2019,
"TinyBERT", equation 8), or 1 − cosine (Sanh et al. 2019, "DistilBERT").

Shapes: B sequences, T positions, C width of the student, W width of the teacher.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LayerPair(NamedTuple):
    """The outputs of a layer of each."""

    student_BTC: Tensor
    teacher_BTW: Tensor
    projection_WC: Tensor | None
    """The weight that takes the student's output to the teacher's width; None: they are equal."""


def hidden_term_sum(pairs: Sequence[LayerPair], counts_BT: Tensor | None, measure: str) -> Tensor:
    """Sum the mean difference of the pairs over all positions, a float32 scalar.

    `measure`: `mse`, the mean over the features, or `cosine`. `counts_BT`: the weight of each
    position; None: 1.
    """
    total = torch.stack([_differences(pair, measure) for pair in pairs]).mean(0)
    return (total if counts_BT is None else total * counts_BT).sum()


def _differences(pair: LayerPair, measure: str) -> Tensor:
    """Return the difference at each position, (B, T), float32 or float64."""
    student_BTC = pair.student_BTC
    if pair.projection_WC is not None:
        student_BTC = F.linear(student_BTC, pair.projection_WC.to(student_BTC.dtype))
    wide = torch.promote_types(student_BTC.dtype, torch.float32)
    own_BTW, wanted_BTW = student_BTC.to(wide), pair.teacher_BTW.detach().to(wide)
    if measure == "cosine":
        return 1 - F.cosine_similarity(own_BTW, wanted_BTW, -1)
    return (own_BTW - wanted_BTW).square().mean(-1)
