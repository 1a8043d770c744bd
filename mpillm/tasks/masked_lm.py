"""Masked language modelling: an encoder finds the tokens that are hidden (Devlin et al. 2018)."""

from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.decoder_rows import added_id
from mpillm.tasks.row_draws import row_draws
from mpillm.tasks.task import RawArrays
from mpillm.tasks.task_catalog import TaskSettings
from mpillm.tasks.vocabulary import Lengths, Vocabulary

# Of the chosen tokens, BERT hides 80%, replaces 10% by any token, and leaves 10% as they are.
HIDDEN, HIDDEN_OR_REPLACED = 0.8, 0.9


class MaskedLM(CrossEntropyTask):
    """Masked language modelling. Fields: `ids`, `targets`, `counts`, `documents` (optional), each
    (B, T). Chosen tokens count; added tokens such as [SEP] are never chosen.
    """

    name: ClassVar[str] = "masked-lm"
    output_kind: ClassVar[OutputKind] = "hidden tokens"
    sums_positions: ClassVar[bool] = True
    field_names: ClassVar[tuple[str, ...]] = ("ids", "targets", "counts")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")

    def __init__(
        self,
        vocabulary: Vocabulary,
        mask: int,
        share: float = 0.15,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        """Hide the `share` of tokens by the id `mask`."""
        super().__init__(label_smoothing, z_loss)
        self.vocabulary, self.mask, self.share = vocabulary, mask, share
        self._fixed = np.array(sorted(vocabulary.special.values()), np.int64)

    @classmethod
    def make(cls, settings: TaskSettings, vocabulary: Vocabulary, lengths: Lengths) -> Self:
        named = settings.mask_token
        mask = added_id(vocabulary, named, "mask_token") if named else vocabulary.size
        return cls(vocabulary, mask, settings.masked_share, **settings.terms)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": max(vocabulary.size, self.mask + 1)}

    def row_tokens(self, lengths: Lengths) -> int:
        return lengths.context

    def positions(self, tokens: int) -> int:
        return tokens

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        tokens_BT = raw["tokens"].astype(np.int64)
        rows, positions = tokens_BT.shape
        chance = row_draws(raw["keys"], 3 * positions).reshape(rows, 3, positions)
        chosen_BT = (chance[:, 0] < self.share) & ~np.isin(tokens_BT, self._fixed)
        other_BT = (chance[:, 2] * self.vocabulary.size).astype(np.int64)
        ids_BT = np.where(chance[:, 1] < HIDDEN_OR_REPLACED, other_BT, tokens_BT)
        ids_BT = np.where(chance[:, 1] < HIDDEN, self.mask, ids_BT)
        fields = {
            "ids": np.where(chosen_BT, ids_BT, tokens_BT),
            "targets": tokens_BT,
            "counts": chosen_BT,
        }
        if "documents" in raw:
            fields["documents"] = raw["documents"]
        return {name: torch.from_numpy(field) for name, field in fields.items()}
