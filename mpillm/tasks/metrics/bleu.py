"""BLEU and chrF of whole corpora, by sacrebleu (Post 2018), whose signature a figure names."""

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np

from mpillm.system.extras import require_packages
from mpillm.tasks.metrics.metric import Array, Totals
from mpillm.tasks.metrics.text_metric import References, TextMetric


class Bleu(TextMetric):
    """BLEU with sacrebleu's defaults: tokens of 13a, exponential smoothing; 0 to 100."""

    name: ClassVar[str] = "bleu"
    title: ClassVar[str] = "BLEU"
    digits: ClassVar[int] = 2
    scorer: ClassVar[str] = "BLEU"

    @cached_property
    def _scorer(self) -> Any:
        require_packages(f"the metric {self.name}", "sacrebleu")
        import sacrebleu

        return getattr(sacrebleu, self.scorer)()

    def signature(self, references: Collection[int]) -> str:
        # sacrebleu's own number for texts that have unequally many.
        self._scorer.num_refs = next(iter(references)) if len(references) == 1 else -1
        return f"{self.scorer}|{self._scorer.get_signature()}"

    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        # Its own form: a list of first references, one of second ones, None where there is none.
        streams = [list(stream) for stream in zip_longest(*references)]
        # What its own significance tests resample: sums over sentences give the corpus score.
        found = self._scorer._extract_corpus_statistics(list(hypotheses), streams)
        return np.array(found, np.float64)

    def value(self, sums: Array, totals: Totals) -> float:
        counts = [round(number) for number in sums.tolist()]
        return float(self._scorer._compute_score_from_stats(counts).score)


class Chrf(Bleu):
    """chrF2 with sacrebleu's defaults: up to 6 characters, no words; 0 to 100."""

    name: ClassVar[str] = "chrf"
    title: ClassVar[str] = "chrF"
    scorer: ClassVar[str] = "CHRF"
