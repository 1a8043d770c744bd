"""Means, spreads and intervals of folds and seeds, compared with SciPy and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from mpillm.train.folds.fold_summary import FigureSpread, spread_of, summarise


def test_quantiles_are_those_of_students_t() -> None:
    for count in (*range(2, 60), 200, 1000):
        values = np.random.default_rng(count).normal(size=count).tolist()
        found = spread_of(values, share=0.0)
        low, high = stats.t.interval(
            0.95, count - 1, np.mean(values), np.std(values, ddof=1) / math.sqrt(count)
        )
        assert found.interval == pytest.approx((low, high), rel=1e-4, abs=1e-4)


def test_seeds_of_a_fold_are_averaged_first() -> None:
    runs = [(fold, seed) for fold in (1, 2, 3) for seed in (0, 1)]
    accuracies = [0.5, 0.7, 0.8, 0.6, 0.9, 0.9]
    values = [
        {"validation_loss": 1.0, "validation_accuracy": each}
        | ({"validation_x": 1.0} if number else {})
        for number, each in enumerate(accuracies)
    ]
    summary = summarise(runs, values)
    # A figure that some run lacks has no mean.
    assert list(summary.figures) == ["validation_loss", "validation_accuracy"]
    found = summary.figures["validation_accuracy"]
    means = [0.6, 0.7, 0.9]
    assert found.mean == pytest.approx(np.mean(means))
    assert found.spread == pytest.approx(np.std(means, ddof=1))
    assert found.interval is not None
    half = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) * math.sqrt(1 / 3 + 1 / 2)
    assert found.interval[1] - found.mean == pytest.approx(half, rel=1e-4)
    seeds = summarise([(0, 0), (0, 1)], values[:2]).figures["validation_accuracy"]
    assert seeds.spread == pytest.approx(np.std([0.5, 0.7], ddof=1))
    alone = summarise([(0, 0)], values[:1]).figures["validation_loss"]
    assert alone == FigureSpread(1.0, None, None)


def test_the_interval_of_folds_covers_what_a_naive_one_misses() -> None:
    """Five-fold cross-validation of a mean as the predictor, whose expected error is known."""
    chance = np.random.default_rng(1)
    naive = corrected = 0
    trials, rows, folds = 800, 20, 5
    # The predictor is the mean of 16 rows: its expected squared error is 1 + 1/16.
    truth = 1 + 1 / (rows - rows // folds)
    for _ in range(trials):
        parts = np.split(chance.normal(size=rows), folds)
        errors = [
            float(np.mean((part - np.mean(np.concatenate(parts[:n] + parts[n + 1 :]))) ** 2))
            for n, part in enumerate(parts)
        ]
        for share in (0.0, 1 / (folds - 1)):
            interval = spread_of(errors, share).interval
            assert interval is not None
            held = interval[0] <= truth <= interval[1]
            naive += held and share == 0
            corrected += held and share > 0
    assert naive < corrected
    assert corrected / trials > 0.93
