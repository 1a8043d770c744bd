"""Spearman's correlation, compared with SciPy, and its replicates with rows that are repeated."""

import numpy as np
import pytest
from mpi4py import MPI
from scipy.stats import spearmanr

from mpillm.infer.scores.bootstrap import REPLICATES, draw_weights
from mpillm.infer.scores.exact_sums import in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.tasks.metrics.metric import Array
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.metrics.spearman import Spearman


def correlation(found: Array, targets: Array) -> float:
    rows = Spearman().of_rows([found], {"targets": targets})
    return float(Spearman().values_of_rows(rows, np.ones((1, len(rows)), np.uint8))[0])


def test_it_equals_scipy_on_random_cases_with_ties() -> None:
    chance = np.random.default_rng(8)
    ties = 0
    for number in range(1000):
        rows = int(chance.integers(2, 60))
        targets = chance.normal(size=rows)
        found = targets * chance.normal() + chance.normal(size=rows)
        if number % 2:
            found, targets = np.round(found), np.round(targets)
        if len(set(found)) < 2 or len(set(targets)) < 2:
            assert correlation(found, targets) == 0
            continue
        ties += len(set(found)) < rows
        outputs = found[:, None] if number % 3 else found
        expected = float(spearmanr(found, targets).statistic)
        assert correlation(outputs, targets) == pytest.approx(expected, abs=1e-12)
    assert ties > 300


def scored(found: Array, targets: Array, comm: MPI.Intracomm, intervals: bool = True) -> Score:
    """Score rows that ranks share by turns, in batches."""
    metrics = make_metrics(["mse", "spearman", "pearson"])
    own = np.arange(comm.rank, len(found), comm.size)
    tables = [m.of_rows([found[own]], {"targets": targets[own]}) for m in metrics]
    whole = np.concatenate([np.ones((len(own), 2)), *tables], axis=1)
    widths = [table.shape[1] for table in tables] if len(own) else ()
    rows = in_batches(own, whole)
    return score_rows(rows, widths, metrics, comm, rows=len(found), intervals=intervals)


def test_ranks_agree_and_replicates_repeat_rows(comm: MPI.Intracomm) -> None:
    chance = np.random.default_rng(4)
    # More than a batch of rows, and fewer rows than ranks.
    for count in (600, 2):
        targets = np.round(chance.normal(size=count), 1) + np.arange(count)
        found = targets + chance.normal(size=count)
        score = scored(found, targets, comm)
        assert score == scored(found, targets, MPI.COMM_SELF)
        assert comm.allgather(score) == [score] * comm.size
        assert list(score.values) == ["mse", "spearman", "pearson"]
        assert score.values == scored(found, targets, comm, intervals=False).values
        replicates = score.replicates["spearman"]
        assert len(replicates) == REPLICATES
        weights = draw_weights(np.arange(count), 8).astype(int)
        for weights_N, value in zip(weights, replicates, strict=False):
            drawn = np.repeat(np.arange(count), weights_N)
            if len(set(drawn.tolist())) > 1:
                expected = spearmanr(found[drawn], targets[drawn]).statistic
                assert value == pytest.approx(expected, abs=1e-9)
            else:
                assert value == 0 or (np.isnan(value) and not len(drawn))


def test_what_is_not_finite_has_no_correlation() -> None:
    assert np.isnan(correlation(np.array([1.0, np.nan, 2.0]), np.arange(3.0)))
