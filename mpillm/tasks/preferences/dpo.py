"""Direct preference optimization (Rafailov et al. 2023): chosen answers over rejected ones."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.tasks.preferences.preference import PreferenceTask, answers_there
from mpillm.tasks.task import Fields


class DPO(PreferenceTask):
    """Pairs of answers. Documents 2n and 2n + 1 of a row are the chosen and the rejected answer.

    The loss of a pair is −log σ(β · margin), and the margin the chosen log-ratio less the rejected
    one (equation 7). With label smoothing ε it is −(1 − ε) log σ(β · margin) − ε log σ(−β · margin)
    (conservative DPO: Mitchell 2023), in training alone.
    """

    name: ClassVar[str] = "dpo"
    pair_kinds: ClassVar[tuple[str, ...]] = ("preference",)
    terms: ClassVar[tuple[str, ...]] = ("label_smoothing",)

    def losses(
        self, ratios_BD: Tensor, fields: Fields, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        rows = len(ratios_BD)
        ratios_BN2 = ratios_BD.view(rows, -1, 2)
        there_BN = answers_there(fields).view(rows, -1, 2).all(2)
        margins_BN = self.beta * (ratios_BN2[..., 0] - ratios_BN2[..., 1])
        losses_BN = -F.logsigmoid(margins_BN)
        if label_smoothing:
            flipped_BN = -F.logsigmoid(-margins_BN)
            losses_BN = (1 - label_smoothing) * losses_BN + label_smoothing * flipped_BN
        return torch.where(there_BN, losses_BN, 0), there_BN

    def sides(self, ratios_BD: Tensor, fields: Fields) -> Tensor:
        return ratios_BD[:, :2]
