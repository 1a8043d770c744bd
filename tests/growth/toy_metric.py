"""A toy metric that needs the outputs: the share of counted targets that are predicted."""

from typing import ClassVar

from mpillm.tasks.metrics.metric import Metric


class Accuracy(Metric):
    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "accuracy"

    def of_rows(self, outputs, fields):
        (logits_BTV,) = outputs
        hits_BT = logits_BTV.argmax(-1) == fields["targets"]
        return (hits_BT & fields["counts"]).sum(1, keepdims=True)

    def value(self, sums, totals) -> float:
        return sums[0] / totals.weight
