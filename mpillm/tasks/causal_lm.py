"""Causal language modelling: each position predicts the next token."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.task import RawArrays


class CausalLM(CrossEntropyTask):
    """Causal language modelling. Fields: `ids`, `targets`, `documents` (optional), each (B, T).

    Targets are one position later than ids.
    """

    name: ClassVar[str] = "causal-lm"
    output_kind: ClassVar[OutputKind] = "next tokens"
    sums_positions: ClassVar[bool] = True
    field_names: ClassVar[tuple[str, ...]] = ("ids", "targets")

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        # int64: the dtype that embeddings and cross_entropy index with.
        tokens_BT = torch.from_numpy(raw["tokens"].astype(np.int64, copy=False))
        fields = {"ids": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
        if "documents" in raw:
            fields["documents"] = torch.from_numpy(raw["documents"])[:, :-1]
        return fields

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows * context)
