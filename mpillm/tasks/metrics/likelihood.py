"""Metrics of the likelihood alone: mean loss, perplexity, bits per byte."""

import math
from typing import ClassVar

from mpillm.tasks.metrics.metric import TOKENS, Array, Metric, Totals

# exp(700) is about 1e304: beyond, a float64 overflows.
LARGEST_EXPONENT = 700.0


class Loss(Metric):
    """The mean loss of a target, in nats."""

    name: ClassVar[str] = "loss"
    title: ClassVar[str] = "loss (nats a token)"
    lower_is_better: ClassVar[bool] = True

    def value(self, sums: Array, totals: Totals) -> float:
        return totals.loss


class Perplexity(Metric):
    """exp of the mean loss."""

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[bool] = True
    digits: ClassVar[int] = 2
    output_kinds: ClassVar[tuple[str, ...]] = TOKENS

    def value(self, sums: Array, totals: Totals) -> float:
        # A diverged model has a perplexity too large to print, not an exception.
        return math.exp(min(totals.loss, LARGEST_EXPONENT))


class BitsPerByte(Metric):
    """The loss of all targets, ends of documents included, in bits a byte of text.

    Models with different tokenizers can be compared by it.
    """

    name: ClassVar[str] = "bits-per-byte"
    title: ClassVar[str] = "bits per byte"
    lower_is_better: ClassVar[bool] = True
    output_kinds: ClassVar[tuple[str, ...]] = TOKENS

    def value(self, sums: Array, totals: Totals) -> float:
        return totals.loss * totals.weight / math.log(2) / max(1.0, totals.text_bytes)
