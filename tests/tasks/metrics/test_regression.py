"""Metrics of numbers, compared with scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, mean_squared_error

from mpillm.tasks.metrics.metric import Totals
from mpillm.tasks.metrics.regression import AbsoluteError, Pearson, SquaredError

TOTALS = Totals(0.0, 1.0, 0)


def test_both_equal_their_oracles_on_random_cases() -> None:
    chance = np.random.default_rng(3)
    for number in range(1000):
        rows = int(chance.integers(2, 50))
        targets = chance.normal(chance.normal(0, 5), chance.uniform(0.1, 3), rows)
        found = targets * chance.normal() + chance.normal(size=rows)
        fields, outputs = {"targets": targets}, found[:, None] if number % 2 else found
        mse = SquaredError().of_rows([outputs], fields).sum(0)
        assert SquaredError().value(mse, TOTALS) == pytest.approx(
            mean_squared_error(targets, found), rel=1e-9
        )
        mae = AbsoluteError().of_rows([outputs], fields).sum(0)
        assert AbsoluteError().value(mae, TOTALS) == pytest.approx(
            mean_absolute_error(targets, found), rel=1e-9
        )
        r = Pearson().of_rows([outputs], fields).sum(0)
        assert Pearson().value(r, TOTALS) == pytest.approx(pearsonr(targets, found)[0], abs=1e-6)


def test_a_constant_has_no_correlation() -> None:
    statistics = Pearson().of_rows([np.ones((4, 1))], {"targets": np.arange(4.0)})
    assert Pearson().value(statistics.sum(0), TOTALS) == 0
