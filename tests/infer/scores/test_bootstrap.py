"""Draws of the bootstrap, its intervals and its p, compared with the plain way and with theory."""

import math

import numpy as np
import pytest

from mpillm.infer.scores.bootstrap import (
    MOST_DRAWS,
    draw_weights,
    p_of_difference,
    percentile_interval,
)
from mpillm.infer.scores.exact_sums import DRAW_BITS


def test_draws_are_poisson_numbers_and_follow_from_the_row_alone() -> None:
    weights = draw_weights(np.arange(300), 1000)
    assert weights.shape == (1000, 300)
    shares = np.bincount(weights.astype(int).reshape(-1), minlength=8)[:8] / weights.size
    expected = [math.exp(-1) / math.factorial(number) for number in range(8)]
    np.testing.assert_allclose(shares, expected, atol=2e-3)
    # Rows are independent of each other.
    assert np.abs(np.corrcoef(weights[:, :20].T) - np.eye(20)).max() < 0.15
    np.testing.assert_array_equal(draw_weights(np.arange(120, 127), 1000), weights[:, 120:127])
    np.testing.assert_array_equal(draw_weights(np.arange(120, 127), 10), weights[:10, 120:127])
    assert (draw_weights(np.arange(300), 1000, seed=3) != weights).any()
    assert MOST_DRAWS < 1 << DRAW_BITS


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, 2000)
    weights = draw_weights(np.arange(2000), 1000)
    interval = percentile_interval(weights @ values / weights.sum(1))
    assert interval is not None
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_too_few_rows_have_no_interval() -> None:
    assert percentile_interval(np.array([1.0, math.nan, math.nan])) is None
    assert percentile_interval(np.array([1.0, 1.0, math.nan])) == (1.0, 1.0)


def test_p_under_a_null_is_evenly_distributed() -> None:
    """Two models alike, whose rows are exchanged at random: p < 0.05 in 3 to 7% of the trials."""
    chance, rows = np.random.default_rng(5), 400
    weights = draw_weights(np.arange(rows), 1000)
    totals = weights.sum(1)
    better = chance.random(rows) < 0.8
    worse = better & (chance.random(rows) < 0.9)
    exchanged = np.where(chance.random((1000, rows)) < 0.5, 1.0, -1.0)
    hits = exchanged * (better.astype(np.float64) - worse)
    differences = weights @ hits.T / totals[:, None]
    found = hits.mean(1)
    p = np.array([p_of_difference(f, d) for f, d in zip(found, differences.T, strict=True)])
    assert 0.03 <= (p < 0.05).mean() <= 0.07
    assert 0.45 < np.median(p) < 0.6


def test_a_difference_of_nothing_is_never_significant() -> None:
    assert p_of_difference(0.0, np.zeros(1000)) == 1.0
    assert math.isnan(p_of_difference(math.nan, np.zeros(1000)))
    assert math.isnan(p_of_difference(0.0, np.full(1000, math.nan)))
    assert p_of_difference(1.0, 1 + np.random.default_rng(0).normal(0, 0.1, 1000)) < 0.002
