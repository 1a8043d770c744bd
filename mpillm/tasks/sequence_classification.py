"""Classes of whole texts."""

from typing import ClassVar

from mpillm.models.spec import OutputKind
from mpillm.tasks.cross_entropy import CrossEntropyTask
from mpillm.tasks.text_task import TextTask


class SequenceClassification(TextTask, CrossEntropyTask):
    """A class of each text: `targets` (B,) are the numbers of classes."""

    name: ClassVar[str] = "sequence-classification"
    output_kind: ClassVar[OutputKind] = "a class of each row"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro-f1")
    problem_type: ClassVar[str] = "single_label_classification"
    pair_kinds: ClassVar[tuple[str, ...]] = ("sequence-classification",)

    def fixed_weight(self, rows: int, context: int) -> float:
        return float(rows)
