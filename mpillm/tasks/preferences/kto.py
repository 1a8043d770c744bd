"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): desirable answers, and others."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mpillm.tasks.preferences.preference import PreferenceTask, answers_there, document_sums
from mpillm.tasks.task import Fields

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings


class KTO(PreferenceTask):
    """Answers with a label. Each document of a row is an answer.

    With the log-ratio r, the loss of a desirable answer is λ_D · (1 − σ(β · (r − z₀))), and that of
    another one is λ_U · (1 − σ(β · (z₀ − r))) (section 4.1). The reference point z₀ is the field
    `baseline`, (B, 1): an estimate of the divergence from the reference, without gradients. Without
    the field, as in an evaluation, it is 0.
    """

    name: ClassVar[str] = "kto"
    pair_kinds: ClassVar[tuple[str, ...]] = ("kto",)
    needs_baseline: ClassVar[bool] = True

    def __init__(self, settings: "TaskSettings") -> None:
        super().__init__(settings)
        self.weights = settings.desirable_weight, settings.undesirable_weight

    def losses(
        self, ratios_BD: Tensor, fields: Fields, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        there_BD, desirable, undesirable = answers_there(fields), *self.weights
        if "baseline" in fields:
            ratios_BD = ratios_BD - fields["baseline"]
        gains_BD = self.beta * ratios_BD
        # 1 − σ(x) = σ(−x).
        losses_BD = torch.where(
            _rejected(fields),
            undesirable * gains_BD.sigmoid(),
            desirable * (-gains_BD).sigmoid(),
        )
        return torch.where(there_BD, losses_BD, 0), there_BD

    def sides(self, ratios_BD: Tensor, fields: Fields) -> Tensor:
        own_B1, rejected_B1 = ratios_BD[:, :1], _rejected(fields)[:, :1]
        sides_B2 = torch.cat([~rejected_B1, rejected_B1], 1)
        return torch.where(sides_B2, own_B1, torch.nan)


def _rejected(fields: Fields) -> Tensor:
    """Return which documents are answers that are not desirable, (B, D)."""
    return document_sums((fields["rejected"] * fields["counts"]).double(), fields["documents"]) > 0
