"""Several classes, or none, of each text, such as its topics."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.linear_head import Outputs, plain_outputs
from mpillm.models.spec import OutputKind
from mpillm.tasks.task import Fields
from mpillm.tasks.text_task import TextTask


class MultiLabelClassification(TextTask):
    """Any set of classes of each text: `targets` (B, K), float32, 1 for each of its classes.

    The loss is the mean binary cross-entropy over texts and classes, in nats: that of transformers
    for `problem_type` = "multi_label_classification". A class is found where its output is above 0,
    and so its probability above a half.
    """

    name: ClassVar[str] = "multi-label-classification"
    problem_type: ClassVar[str] = "multi_label_classification"
    output_kind: ClassVar[OutputKind] = "a set of classes of each row"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "micro-f1", "macro-f1")
    pair_kinds: ClassVar[tuple[str, ...]] = ("multi-label-classification",)
    raw_target: ClassVar[str] = "classes"

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return self.row_losses(outputs, fields).sum()

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        targets_BK = fields["targets"]
        # A model may have more classes than the data.
        logits_BK = plain_outputs(outputs)[0][:, : targets_BK.shape[1]]
        logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
        losses = F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none")
        return losses.sum(1)

    def weight(self, fields: Fields) -> float:
        return float(fields["targets"].numel())

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows * len(self.classes))
