"""The base of tasks that compare answers with those of a reference: the weights at the start.

The log-ratio of an answer is log π(answer) − log π_ref(answer). The reference's part is in the data
of a run, computed once before its first step: no second model is there.

Shapes: B rows, T positions, D documents of a row: a document is an answer with its prompt.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.models.linear_head import Outputs
from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import cross_entropy_sum, position_losses
from mpillm.tasks.task import Fields, RawArrays, Task
from mpillm.tasks.vocabulary import Lengths, Vocabulary

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings


class PreferenceTask(Task):
    """A task whose loss is a function of the log-ratios of answers.

    Fields, each (B, T): those of `Chat`; `rejected`, 1 in documents of rejected answers; and
    `reference`, float64: the reference's log-probability of an answer where its document begins.
    """

    output_kind: ClassVar[OutputKind] = "next tokens"
    reads_heads: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    metrics_read_logits: ClassVar[bool] = False
    metric_kind: ClassVar[str] = "rewards of answers"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "preference-accuracy", "reward-margin")
    field_names: ClassVar[tuple[str, ...]] = (
        "ids",
        "targets",
        "counts",
        "documents",
        "rejected",
        "reference",
    )

    def __init__(self, settings: "TaskSettings") -> None:
        self.beta, self.label_smoothing = settings.beta, settings.label_smoothing

    @classmethod
    def make(cls, settings: "TaskSettings", vocabulary: Vocabulary, lengths: Lengths) -> Self:
        return cls(settings)

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        tokens_BT = torch.from_numpy(raw["tokens"].astype(np.int64, copy=False))
        own = {name: torch.from_numpy(raw[name]) for name in ("documents", "rejected", "reference")}
        return {
            "ids": tokens_BT[:, :-1],
            "targets": tokens_BT[:, 1:],
            "counts": torch.from_numpy(raw["supervised"][:, 1:] != 0),
            # A document has two tokens or more, so each has an input.
            **{name: field_BT[:, :-1] for name, field_BT in own.items()},
        }

    @abstractmethod
    def losses(
        self, ratios_BD: Tensor, fields: Fields, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of records, (B, n), and which of these are there, (B, n).

        `ratios_BD`: the log-ratio of each answer, float64; 0 where there is none.
        """

    @abstractmethod
    def sides(self, ratios_BD: Tensor, fields: Fields) -> Tensor:
        """Return the log-ratios of rows of one record, (B, 2): of a chosen answer, and of a
        rejected one; NaN where it has none.
        """

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return self._sum(outputs, fields, 0.0)

    def objective_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return self._sum(outputs, fields, self.label_smoothing)

    def _sum(self, outputs: Outputs, fields: Fields, label_smoothing: float) -> Tensor:
        """Sum the losses. Logits are read in chunks, twice: for the log-ratios, and then for the
        gradient, which is that of a cross-entropy whose targets have the loss's slopes as weights.
        """
        ratios_BD = self.log_ratios(outputs, fields)
        if not torch.is_grad_enabled():
            return self.losses(ratios_BD, fields, label_smoothing)[0].sum().float()
        ratios_BD = ratios_BD.requires_grad_()
        loss = self.losses(ratios_BD, fields, label_smoothing)[0].sum()
        [slopes_BD] = torch.autograd.grad(loss, ratios_BD)
        documents_BT = fields["documents"].to(slopes_BD.device)
        weights_BT = -slopes_BD.gather(1, documents_BT) * fields["counts"]
        surrogate = cross_entropy_sum(outputs[0], fields["targets"], weights_BT.float())
        # The value is the loss to its last bit, the gradient is the surrogate's.
        return loss.detach().to(surrogate.dtype) + (surrogate - surrogate.detach())

    def log_ratios(self, outputs: Outputs, fields: Fields) -> Tensor:
        """Return log π − log π_ref of each answer, float64 (B, D), without gradients."""
        nll_BT = position_losses(outputs[0], fields["targets"], fields["counts"])
        return document_sums(-nll_BT.double() - fields["reference"], fields["documents"])

    def weight(self, fields: Fields) -> float:
        ratios_BD = document_sums(fields["reference"], fields["documents"])
        return float(self.losses(ratios_BD, fields)[1].sum())

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        return self.losses(self.log_ratios(outputs, fields), fields)[0].sum(1)

    def metric_outputs(self, outputs: Outputs, fields: Fields) -> tuple[Tensor, ...]:
        """Return the rewards β · log-ratio of rows of one record, (B, 2): see `sides`."""
        return (self.beta * self.sides(self.log_ratios(outputs, fields), fields),)


def document_sums(values_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Sum the values of each document of a row, (B, D); D is even, and T or one more."""
    rows, positions = values_BT.shape
    # Of the shape alone: the largest number on a GPU would have to be waited for.
    sums_BD = values_BT.new_zeros((rows, positions + positions % 2))
    return sums_BD.scatter_add_(1, documents_BT.to(values_BT.device), values_BT)


def answers_there(fields: Fields) -> Tensor:
    """Return which documents of a row are answers, (B, D): padding has nothing that is learnt."""
    return document_sums(fields["counts"].double(), fields["documents"]) > 0
