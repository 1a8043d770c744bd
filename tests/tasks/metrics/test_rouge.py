"""ROUGE, compared with rouge-score's own loop over a corpus."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.rouge import Rouge1, Rouge2, RougeL

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran"),
    *("in", "rivers", "of", "running", "water"),
)


def test_each_is_the_mean_of_rouge_scores() -> None:
    chance = np.random.default_rng(0)
    oracle = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    hypotheses, references = (
        [" ".join(chance.choice(WORDS, chance.integers(1, 12))) for _ in range(1000)] for _ in "ab"
    )
    scores = [oracle.score(*pair) for pair in zip(references, hypotheses, strict=True)]
    for metric in (Rouge1(), Rouge2(), RougeL()):
        rows = metric.of_texts(hypotheses, [[each] for each in references])
        expected = [score[metric.kind].fmeasure for score in scores]
        assert rows[:, 0] == pytest.approx(expected, abs=1e-9)
        assert metric.value(rows.sum(0), Totals(0, 1000.0, 0)) == pytest.approx(np.mean(expected))


def test_the_best_reference_counts_and_the_signature_names_the_release() -> None:
    rows = Rouge2().of_texts(["the cat sat"], [["a dog ran", "the cat sat"]])
    assert rows.tolist() == [[1.0]]
    assert RougeL().signature([1]).startswith("rougeL|stemmer:no|rouge-score:0.")
