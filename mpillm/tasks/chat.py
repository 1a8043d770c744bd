"""Chat: a decoder learns the assistant's words and the end of its turns, and reads all else."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.task import RawArrays


class Chat(CrossEntropyTask):
    """Instruction tuning. Fields: `ids`, `targets`, `counts`, `documents` (packed), each (B, T).

    Targets are one position later than ids. The first token of a conversation is never learnt, so
    no conversation predicts the next one of its row.
    """

    name: ClassVar[str] = "chat"
    output_kind: ClassVar[OutputKind] = "next tokens"
    sums_positions: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    field_names: ClassVar[tuple[str, ...]] = ("ids", "targets", "counts")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    text_metrics: ClassVar[tuple[str, ...]] = ("exact-match", "squad-f1", "rouge-l")
    pair_kinds: ClassVar[tuple[str, ...]] = ("chat",)

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        tokens_BT = torch.from_numpy(raw["tokens"].astype(np.int64, copy=False))
        counts_BT = torch.from_numpy(raw["supervised"][:, 1:] != 0)
        fields = {"ids": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:], "counts": counts_BT}
        if "documents" in raw:
            fields["documents"] = torch.from_numpy(raw["documents"])[:, :-1]
        return fields
