"""Classes of pictures."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.task import RawArrays
from mpillm.tasks.vocabulary import Vocabulary


class ImageClassification(CrossEntropyTask):
    """A class of each picture. Fields: `pixels` (B, C, height, width), float32, and `targets` (B,).

    Pixels from 0 to 255 become -1 to 1, as ViT reads them; others stay as they are.
    """

    name: ClassVar[str] = "image-classification"
    output_kind: ClassVar[OutputKind] = "a class of each row"
    field_names: ClassVar[tuple[str, ...]] = ("pixels", "targets")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro-f1")
    pair_kinds: ClassVar[tuple[str, ...]] = ("image-classification",)

    def model_settings(self, vocabulary: Vocabulary) -> dict[str, int]:
        return {"classes": len(vocabulary.classes)}

    def fields(self, raw: RawArrays) -> dict[str, Tensor]:
        pixels = raw["pixels"]
        scaled = pixels / np.float32(127.5) - 1 if pixels.dtype == np.uint8 else pixels
        return {
            "pixels": torch.from_numpy(scaled.astype(np.float32, copy=False)),
            "targets": torch.from_numpy(raw["label"]),
        }

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows)
