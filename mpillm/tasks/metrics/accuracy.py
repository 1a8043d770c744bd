"""The share of counted targets whose own output is the largest."""

from collections.abc import Sequence
from typing import ClassVar

from mpillm.tasks.metrics.metric import CLASSES, TOKENS, Array, Arrays, Metric, Totals, row_sums


class Accuracy(Metric):
    """Top-1 accuracy over the targets that count, of tokens or of classes."""

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "accuracy"
    sums_positions: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = CLASSES + TOKENS

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        hits = outputs[0].argmax(-1) == fields["targets"]
        return row_sums(hits * fields["counts"] if "counts" in fields else hits)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight
