"""Connectionist temporal classification: text of sound, over all alignments (Graves 2006)."""

from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mpillm.models.spec import OutputKind
from mpillm.tasks.task import Fields, RawArrays, Task
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary, positions_of

# The output that is no token; token t of the tokenizer is output t + 1.
BLANK = 0


class CTC(Task):
    """Text of sound by an encoder. Fields: `frames` (B, F, mels), `lengths` (B,) of positions, and
    `targets`, `counts` (B, T). The model's logits are (B, F / 2, V). Where a token
    alone parts words, `spaces` (B,) is its output, for the word error rate.
    """

    name: ClassVar[str] = "ctc"
    output_kind: ClassVar[OutputKind] = "aligned tokens"
    field_names: ClassVar[tuple[str, ...]] = ("frames", "lengths", "targets", "counts")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "token-error-rate")
    pair_kinds: ClassVar[tuple[str, ...]] = ("ctc",)

    def __init__(self, space: int | None = None) -> None:
        """Part words by the token `space`, for the word error rate; None: it is not known."""
        self.space = space

    @classmethod
    def make(cls, settings: TaskSettings, vocabulary: Vocabulary, lengths: Lengths) -> Self:
        return cls(vocabulary.space)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": vocabulary.size + 1}

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        targets_BT = torch.from_numpy(raw["target"]) + 1
        lengths_B = torch.from_numpy(raw["target_lengths"])
        rows = len(targets_BT)
        known = {} if self.space is None else {"spaces": torch.full((rows,), self.space + 1)}
        return {
            **known,
            "frames": torch.from_numpy(raw["frames"]),
            "lengths": positions_of(torch.from_numpy(raw["source_lengths"])),
            "targets": targets_BT,
            "counts": torch.arange(targets_BT.shape[1]) < lengths_B[:, None],
        }

    def loss_sum(self, outputs: tuple[Tensor, ...], fields: Fields) -> Tensor:
        (logits_BTV,) = outputs
        log_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
        lengths_B = fields["lengths"].cpu().clamp(max=logits_BTV.shape[1])
        counts_B = fields["counts"].sum(1).cpu()
        # A target that is longer than its sound has no alignment: its loss would be infinite.
        return F.ctc_loss(
            log_TBV, fields["targets"], lengths_B, counts_B, BLANK, "sum", zero_infinity=True
        )

    def weight(self, fields: Fields) -> float:
        return float(fields["counts"].sum())
