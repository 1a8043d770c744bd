"""Classes of the words of a text, such as names or parts of speech."""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.task import RawArrays
from mpillm.tasks.vocabulary import Vocabulary


class TokenClassification(CrossEntropyTask):
    """A class of each word. Fields: `ids`, `targets`, `counts`, each (B, T), and `lengths` (B,).

    A word counts at its first token. The model's output has the shape (B, T, classes).
    """

    name: ClassVar[str] = "token-classification"
    output_kind: ClassVar[OutputKind] = "a class of each position"
    sums_positions: ClassVar[bool] = True
    field_names: ClassVar[tuple[str, ...]] = ("ids", "lengths", "targets", "counts")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro-f1")
    pair_kinds: ClassVar[tuple[str, ...]] = ("token-classification",)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": vocabulary.size, "classes": len(vocabulary.classes)}

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        labels_BT = torch.from_numpy(raw["labels"])
        return {
            "ids": torch.from_numpy(raw["source"]),
            "lengths": torch.from_numpy(raw["source_lengths"]),
            "targets": labels_BT.clamp(min=0),
            "counts": labels_BT >= 0,
        }
