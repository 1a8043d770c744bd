"""BLEU and chrF, compared with sacrebleu's corpus scores."""

import numpy as np
import pytest
import sacrebleu

from mpillm.tasks.metrics.bleu import Bleu, Chrf
from mpillm.tasks.metrics.metric import Totals

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", ",", "and", "3.5", "dogs", "ran"),
    *(";", "naïve", "Straßen", "wasn't", "你好", "&amp;", "."),
)


@pytest.mark.parametrize(
    ("metric", "whole"), [(Bleu(), sacrebleu.corpus_bleu), (Chrf(), sacrebleu.corpus_chrf)]
)
def test_sums_over_sentences_give_sacrebleus_corpus_score(metric: Bleu, whole: object) -> None:
    chance = np.random.default_rng(0)
    for number in range(1000):
        rows = int(chance.integers(1, 5))
        references = [
            [" ".join(chance.choice(WORDS, chance.integers(3, 12))) for _ in range(1 + number % 2)]
            for _ in range(rows)
        ]
        hypotheses = [
            " ".join(w for w in known[0].split() if chance.random() < 0.8) for known in references
        ]
        streams = [list(each) for each in zip(*references, strict=True)]
        expected = whole(hypotheses, streams).score  # type: ignore[operator]
        sums = metric.of_texts(hypotheses, references).sum(0)
        assert metric.value(sums, Totals(0.0, float(rows), 0)) == pytest.approx(expected, abs=1e-6)


def test_texts_may_have_unequally_many_references() -> None:
    references = [["a cat sat here", "the cat sat on it"], ["dogs ran far away"]]
    hypotheses = ["the cat sat on it", "dogs ran far away"]
    for metric in (Bleu(), Chrf()):
        sums = metric.of_texts(hypotheses, references).sum(0)
        assert metric.value(sums, Totals(0.0, 2.0, 0)) == pytest.approx(100)


def test_the_signature_names_settings_and_release() -> None:
    expected = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    assert Bleu().signature([1]) == expected + sacrebleu.__version__
    assert "nrefs:var" in Bleu().signature([1, 2])
    assert Chrf().signature([2]).startswith("CHRF|nrefs:2|case:mixed|eff:yes|nc:6|nw:0")
