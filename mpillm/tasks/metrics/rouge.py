"""ROUGE-1, 2 and L, the mean F1 of texts, by rouge-score (Lin 2004); no stemming."""

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mpillm.system.extras import require_packages
from mpillm.tasks.metrics.metric import Array, Totals
from mpillm.tasks.metrics.text_metric import References, TextMetric


class Rouge1(TextMetric):
    """The F1 of a text's words, of the reference that fits best."""

    name: ClassVar[str] = "rouge-1"
    title: ClassVar[str] = "ROUGE-1"
    kind: ClassVar[str] = "rouge1"

    @cached_property
    def _scorer(self) -> Any:
        require_packages(f"the metric {self.name}", "rouge_score")
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.kind], use_stemmer=False)

    def signature(self, references: Collection[int]) -> str:
        from importlib.metadata import version

        return f"{self.kind}|stemmer:no|rouge-score:{version('rouge-score')}"

    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        scores = [
            self._scorer.score_multi(list(known), ours)[self.kind].fmeasure
            for ours, known in zip(hypotheses, references, strict=True)
        ]
        return np.array(scores, np.float64).reshape(-1, 1)

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class Rouge2(Rouge1):
    """The F1 of pairs of words."""

    name: ClassVar[str] = "rouge-2"
    title: ClassVar[str] = "ROUGE-2"
    kind: ClassVar[str] = "rouge2"


class RougeL(Rouge1):
    """The F1 of the longest common subsequence of words."""

    name: ClassVar[str] = "rouge-l"
    title: ClassVar[str] = "ROUGE-L"
    kind: ClassVar[str] = "rougeL"
