"""Calibration error and Brier score, compared with the definitions written out and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from mpillm.tasks.metrics.calibration import Brier, CalibrationError
from mpillm.tasks.metrics.metric import Totals


def slow_ece(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Guo et al. 2017, equation 3: bins (m - 1, m] / 15."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(probabilities, targets, strict=True):
        best = int(row.argmax())
        inside = next(m for m in range(1, 16) if row[best] <= m / 15 or m == 15)
        bins.setdefault(inside, []).append((float(row[best]), best == target))
    gaps = (
        abs(sum(right for _, right in each) - math.fsum(p for p, _ in each))
        for each in bins.values()
    )
    return math.fsum(gaps) / len(targets)


def test_both_equal_their_oracles_on_random_cases() -> None:
    chance = np.random.default_rng(1)
    for number in range(1000):
        rows, classes = int(chance.integers(2, 40)), int(chance.integers(2, 6))
        logits = chance.normal(size=(rows, classes)) * chance.uniform(0.2, 5)
        powers = np.exp(logits)
        probabilities = powers / powers.sum(1, keepdims=True)
        targets = chance.integers(0, classes, rows)
        totals = Totals(0.0, float(rows), 0)
        found = {}
        for metric in (CalibrationError(), Brier()):
            statistics = metric.of_rows([logits], {"targets": targets})
            found[metric.name] = metric.value(statistics.sum(0), totals)
        assert found["ece"] == pytest.approx(slow_ece(probabilities, targets), abs=1e-9)
        if number % 4 == 0:
            theirs = (
                brier_score_loss(np.eye(classes)[targets], probabilities, scale_by_half=False)
                if classes > 2
                else 2 * brier_score_loss(targets == 1, probabilities[:, 1])
            )
            assert found["brier"] == pytest.approx(theirs, abs=1e-9)
        expected = np.square(probabilities - np.eye(classes)[targets]).sum(1).mean()
        assert found["brier"] == pytest.approx(expected, abs=1e-9)


def test_only_counted_positions_are_scored() -> None:
    logits = np.log(np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.5, 0.5]]]))
    fields = {"targets": np.array([[0, 1], [1, 1]]), "counts": np.array([[1, 1], [1, 0]]) > 0}
    totals = Totals(0.0, 3.0, 0)
    ece = CalibrationError().of_rows([logits], fields)
    assert CalibrationError().value(ece.sum(0), totals) == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    brier = Brier().of_rows([logits], fields)
    assert brier == pytest.approx(np.array([[0.02 + 0.72, 2], [0.08, 1]]))


def test_a_share_without_positions_adds_nothing() -> None:
    """A rank may have no position of a short row."""
    fields = {"targets": np.zeros((3, 0), int), "counts": np.zeros((3, 0), bool)}
    for metric in (CalibrationError(), Brier()):
        assert not metric.of_rows([np.zeros((3, 0, 4))], fields).any()
