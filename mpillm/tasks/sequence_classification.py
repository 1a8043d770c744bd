"""Classes of whole texts."""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.task import RawArrays
from mpillm.tasks.vocabulary import Vocabulary


class SequenceClassification(CrossEntropyTask):
    """A class of each text. Fields: `ids` (B, T), `lengths` (B,) and `targets` (B,).

    The model's output has the shape (B, classes).
    """

    name: ClassVar[str] = "sequence-classification"
    output_kind: ClassVar[OutputKind] = "a class of each row"
    field_names: ClassVar[tuple[str, ...]] = ("ids", "lengths", "targets")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro-f1")
    pair_kinds: ClassVar[tuple[str, ...]] = ("sequence-classification",)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": vocabulary.size, "classes": len(vocabulary.classes)}

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        names = {"ids": "source", "lengths": "source_lengths", "targets": "label"}
        return {name: torch.from_numpy(raw[given]) for name, given in names.items()}

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows)
