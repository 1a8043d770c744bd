import numpy as np
import pytest

from mpillm.tasks.metrics.macro_f1 import MacroF1
from mpillm.tasks.metrics.metric import Totals

TOTALS = Totals(1.0, 1.0, 0)


def by_hand(found: list[int], targets: list[int]) -> float:
    scores = []
    for each in set(found) | set(targets):
        hits = sum(a == b == each for a, b in zip(found, targets, strict=True))
        scores.append(2 * hits / (found.count(each) + targets.count(each)))
    return sum(scores) / len(scores)


def test_the_sums_of_rows_give_the_score_of_the_whole() -> None:
    chance = np.random.default_rng(1)
    outputs, targets = chance.normal(size=(30, 6)), chance.integers(0, 5, 30)
    sums = MacroF1().of_rows([outputs], {"targets": targets}).sum(0)
    expected = by_hand(outputs.argmax(1).tolist(), targets.tolist())
    assert MacroF1().value(sums, TOTALS) == pytest.approx(expected)


def test_only_counted_tokens_are_scored() -> None:
    outputs = np.eye(3)[[[0, 1, 2], [2, 2, 1]]]
    targets, counts = np.array([[0, 0, 2], [2, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0]]) > 0
    rows = MacroF1().of_rows([outputs], {"targets": targets, "counts": counts})
    assert rows.shape == (2, 9)
    sums = rows.sum(0)
    assert MacroF1().value(sums, TOTALS) == pytest.approx(by_hand([0, 1, 2], [0, 0, 2]))
