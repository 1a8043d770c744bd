"""Answers scored as SQuAD's official script does: its functions are written down below."""

import collections
import re
import string

import numpy as np
import pytest

from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.question_answers import AnswerF1, ExactMatch


def normalize_answer(s: str) -> str:
    """As evaluate-v2.0.py has it."""

    def remove_articles(text: str) -> str:
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text: str) -> str:
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def get_tokens(s: str) -> list[str]:
    if not s:
        return []
    return normalize_answer(s).split()


def compute_exact(a_gold: str, a_pred: str) -> int:
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks = get_tokens(a_gold)
    pred_toks = get_tokens(a_pred)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


WORDS = (
    *("The", "the", "a", "An", "Paris,", "paris", "U.S.", "us", "in", "1789!"),
    *("l'été", "—", "(a)", ",", "river's", "rivers", ""),
)


def test_both_equal_the_official_script() -> None:
    chance = np.random.default_rng(7)

    def text() -> str:
        return " ".join(chance.choice(WORDS, chance.integers(0, 5)))

    for _ in range(1000):
        hypotheses = [text() for _ in range(3)]
        references = [[text() for _ in range(chance.integers(1, 4))] for _ in hypotheses]
        for metric, slow in ((ExactMatch(), compute_exact), (AnswerF1(), compute_f1)):
            expected = [
                max(slow(gold, found) for gold in known)
                for found, known in zip(hypotheses, references, strict=True)
            ]
            rows = metric.of_texts(hypotheses, references)
            assert rows[:, 0] == pytest.approx(expected, abs=1e-9)
            assert metric.value(rows.sum(0), Totals(0.0, 3.0, 0)) == pytest.approx(
                np.mean(expected)
            )
