"""Exact match and F1 of answers, by the rules of SQuAD (Rajpurkar et al. 2016, 2018)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from mpillm.tasks.metrics.metric import Array, Totals
from mpillm.tasks.metrics.text_metric import References, TextMetric

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(TextMetric):
    """The share of answers that equal a reference, both normalised."""

    name: ClassVar[str] = "exact-match"
    title: ClassVar[str] = "exact match"

    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        return _best(hypotheses, references, lambda one, other: float(one == other))

    def value(self, sums: Array, totals: Totals) -> float:
        return float(sums[0]) / totals.weight


class AnswerF1(ExactMatch):
    """The mean F1 of an answer's words, of the reference that fits best.

    An answer without words is right where the reference has none either (SQuAD 2).
    """

    name: ClassVar[str] = "squad-f1"
    title: ClassVar[str] = "SQuAD F1"

    def of_texts(self, hypotheses: Sequence[str], references: References) -> Array:
        return _best(hypotheses, references, words_f1)


def normalised(answer: str) -> str:
    """Drop case, punctuation, articles and more than one space, in this order."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def words_f1(one: str, other: str) -> float:
    """Return the F1 of the words of two normalised answers."""
    ours, theirs = one.split(), other.split()
    if not (ours and theirs):
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _best(
    hypotheses: Sequence[str], references: References, score: Callable[[str, str], float]
) -> Array:
    scores = [
        max(score(normalised(ours), normalised(each)) for each in known)
        for ours, known in zip(hypotheses, references, strict=True)
    ]
    return np.array(scores, np.float64).reshape(-1, 1)
