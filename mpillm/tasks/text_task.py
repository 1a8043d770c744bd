"""The base of all tasks that learn something of each whole text."""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.tasks.task import RawArrays, Task
from mpillm.tasks.vocabulary import Vocabulary


class TextTask(Task):
    """Something of each text. Fields: `ids` (B, T), `lengths` (B,) and `targets`, (B,) or (B, K).

    The model's output has the shape (B, K): a number for each class, or one alone.
    """

    field_names: ClassVar[tuple[str, ...]] = ("ids", "lengths", "targets")
    raw_target: ClassVar[str] = "label"
    """The array of the targets, as `tokens/pairs` names it."""

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"vocab_size": vocabulary.size, "classes": len(vocabulary.classes)}

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        names = {"ids": "source", "lengths": "source_lengths", "targets": self.raw_target}
        return {name: torch.from_numpy(raw[given]) for name, given in names.items()}
