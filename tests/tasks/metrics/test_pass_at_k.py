"""pass@k, compared with the binomials of its definition."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from mpillm.errors import UsageError
from mpillm.tasks.metrics.pass_at_k import pass_at_k


def test_the_estimator_is_that_of_the_binomials() -> None:
    chance = np.random.default_rng(0)
    for _ in range(1000):
        k = int(chance.choice([1, 10, 100]))
        samples = chance.integers(k, 300, 4)
        passed = (samples * chance.choice([0, 0.1, 0.5, 1], 4)).astype(int)
        expected = [
            float(1 - Fraction(comb(n - c, k), comb(n, k)))
            for n, c in zip(samples.tolist(), passed.tolist(), strict=True)
        ]
        assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("samples", "passed"), [(9, 0), (20, 21), (20, -1)])
def test_numbers_that_no_problem_has(samples: int, passed: int) -> None:
    with pytest.raises(UsageError, match=r"pass@10 needs 10 samples.*; problem 1 has"):
        pass_at_k(np.array([10, samples]), np.array([3, passed]), 10)
