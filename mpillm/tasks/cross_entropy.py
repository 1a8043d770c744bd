"""The base of all tasks with a cross-entropy over a vocabulary, and the loss itself."""

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.linear_head import LinearHead, Outputs
from mpillm.tasks.chunked_cross_entropy import chunked_cross_entropy, chunked_losses
from mpillm.tasks.distillation.chunked_distillation import LossMix, MixedLoss, mixed_loss_sum
from mpillm.tasks.distillation.teacher_rows import TeacherRows
from mpillm.tasks.shard_losses import LossTerms
from mpillm.tasks.task import Fields, Task
from mpillm.tasks.vocabulary import Lengths, Vocabulary

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings


class CrossEntropyTask(Task):
    """A task that learns the field `targets` (B, T) from one output: a head, or logits (B, T, V).

    Targets may be (B,), and the output then (B, V).

    A field `counts` (B, T) weighs the targets; without it each counts 1. Where it is 0, the target
    may be any number. Label smoothing and z-loss change the objective of training alone. A class
    that overrides `loss_sum` overrides `objective_sum` too, or takes neither setting.
    """

    reads_heads: ClassVar[bool] = True

    terms: ClassVar[tuple[str, ...]] = ("label_smoothing", "z_loss")

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    @classmethod
    def make(cls, settings: "TaskSettings", vocabulary: Vocabulary, lengths: Lengths) -> Self:
        # A plug-in may take neither.
        return cls(**settings.terms) if settings.terms else cls()

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return cross_entropy_sum(outputs[0], fields["targets"], fields.get("counts"))

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        if type(self).loss_sum is not CrossEntropyTask.loss_sum:
            return super().row_losses(outputs, fields)
        targets = fields["targets"]
        losses = position_losses(outputs[0], targets, fields.get("counts"))
        # A rank that shares positions may have none.
        return losses.view(len(targets), targets.shape[1:].numel()).sum(1)

    def weight(self, fields: Fields) -> float:
        counts = fields.get("counts")
        return float(fields["targets"].numel() if counts is None else counts.sum())

    def objective_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        if not (self.label_smoothing or self.z_loss):
            return self.loss_sum(outputs, fields)
        return cross_entropy_sum(
            outputs[0],
            fields["targets"],
            fields.get("counts"),
            self.label_smoothing,
            self.z_loss,
        )

    @property
    def distils(self) -> bool:
        own = type(self)
        return (own.loss_sum, own.objective_sum) == (
            CrossEntropyTask.loss_sum,
            CrossEntropyTask.objective_sum,
        )

    def mixed_sum(
        self,
        outputs: Outputs,
        fields: Fields,
        teacher: TeacherRows,
        alpha: float,
        temperature: float,
    ) -> MixedLoss:
        terms = LossTerms(self.label_smoothing, self.z_loss)
        mixture = LossMix(alpha, temperature, terms)
        targets, counts = fields["targets"], fields.get("counts")
        return mixed_loss_sum(outputs[0], teacher, targets, counts, mixture)


def position_losses(
    output: Tensor | LinearHead, targets_BT: Tensor, counts_BT: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy at each position, in the shape of the targets, without gradients.

    The arguments are those of `cross_entropy_sum`.
    """
    if isinstance(output, LinearHead):
        return chunked_losses(output, targets_BT, counts_BT)
    logits = output.detach()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    known = targets_BT if counts_BT is None else targets_BT.masked_fill(counts_BT == 0, 0)
    losses = F.cross_entropy(wide, known.flatten(), reduction="none").view(targets_BT.shape)
    return losses if counts_BT is None else losses * counts_BT


def cross_entropy_sum(
    output: Tensor | LinearHead,
    targets_BT: Tensor,
    counts_BT: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum the cross-entropy over all positions, in nats (float32).

    `output`: logits (B, T, V), or a head, which is read in chunks. `counts_BT`: the weight of each
    target; None: 1. `label_smoothing`: the share of the target's probability that all tokens share
    (Szegedy et al. 2016). `z_loss`: the factor of log² Z, which keeps the normaliser Z near 1
    (Chowdhery et al. 2022, section 5: 1e-4).
    """
    if isinstance(output, LinearHead):
        return chunked_cross_entropy(output, targets_BT, counts_BT, label_smoothing, z_loss)
    # float32 whatever the logits: bfloat16 sums of thousands of terms lose most digits.
    logits_NV, targets_N = output.flatten(0, -2), targets_BT.flatten()
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if counts_BT is not None:
        targets_N = targets_N.masked_fill(counts_BT.flatten() == 0, 0)
    reduction = "sum" if counts_BT is None and not z_loss else "none"
    losses = F.cross_entropy(
        logits_NV, targets_N, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        losses = losses + z_loss * logits_NV.logsumexp(1).square()
    if counts_BT is not None:
        losses = losses * counts_BT.flatten()
    return losses.sum()
