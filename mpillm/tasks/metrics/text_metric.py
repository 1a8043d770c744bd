"""The base of metrics that compare texts: what a model wrote with one or several references."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

from mpillm.errors import UsageError
from mpillm.tasks.metrics.metric import Array, Arrays, Metric

References = Sequence[Sequence[str]]


class TextMetric(Metric):
    """A metric of texts. A row is a text; `Totals.weight` counts them."""

    output_kinds: ClassVar[tuple[str, ...]] = ("texts",)

    def signature(self, references: Collection[int]) -> str:
        """Return the settings and the release that a published figure is to name; "" for none.

        `references`: how many references texts have, each number once.
        """
        return ""

    def of_rows(self, outputs: Sequence[Array], fields: Arrays) -> Array:
        raise UsageError(
            f"the metric {self.name} compares texts, and an evaluation of outputs writes none"
        )

    @abstractmethod
    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        """Return the statistics of each text, (B, k), by its references, of which each has one at
        least.
        """
