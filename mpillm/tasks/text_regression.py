"""A number of each text, such as a rating."""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.models.linear_head import Outputs, plain_outputs
from mpillm.models.spec import OutputKind
from mpillm.tasks.task import Fields
from mpillm.tasks.text_task import TextTask
from mpillm.tasks.vocabulary import Vocabulary


class Regression(TextTask):
    """A number of each text, learnt by its squared error: `targets` (B,), float32.

    The loss is the mean squared error, as transformers has it for `problem_type` = "regression".
    """

    name: ClassVar[str] = "regression"
    problem_type: ClassVar[str] = "regression"
    output_kind: ClassVar[OutputKind] = "a number of each row"
    metrics: ClassVar[tuple[str, ...]] = ("mse", "mae", "pearson", "spearman")
    pair_kinds: ClassVar[tuple[str, ...]] = ("regression",)
    raw_target: ClassVar[str] = "number"

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": vocabulary.size, "classes": 1}

    def loss_sum(self, outputs: Outputs, fields: Fields) -> Tensor:
        return self.row_losses(outputs, fields).sum()

    def row_losses(self, outputs: Outputs, fields: Fields) -> Tensor:
        found_B = plain_outputs(outputs)[0].squeeze(1)
        found_B = found_B.to(torch.promote_types(found_B.dtype, torch.float32))
        return (found_B - fields["targets"]).square()

    def weight(self, fields: Fields) -> float:
        return float(len(fields["targets"]))

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows)
