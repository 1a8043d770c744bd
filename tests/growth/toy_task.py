"""A toy task whose weight depends on the data: only targets that are even numbers count."""

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from mpillm.tasks.task import Task


class EvenTargets(Task):
    name: ClassVar[str] = "even-targets"
    field_names: ClassVar[tuple[str, ...]] = ("ids", "targets", "counts")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "growth.toy_metric:Accuracy")

    def fields(self, raw):
        tokens_BT = torch.from_numpy(raw["tokens"].astype(np.int64))
        targets_BT = tokens_BT[:, 1:]
        return {"ids": tokens_BT[:, :-1], "targets": targets_BT, "counts": targets_BT % 2 == 0}

    def loss_sum(self, outputs, fields):
        (logits_BTV,) = outputs
        losses = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), fields["targets"].flatten(), reduction="none"
        )
        return (losses * fields["counts"].flatten()).sum()

    def weight(self, fields) -> float:
        return float(fields["counts"].sum())
