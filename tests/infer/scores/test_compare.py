"""The differences of two models, compared with draws written out."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.errors import MismatchError
from mpillm.infer.scores.bootstrap import draw_weights
from mpillm.infer.scores.compare import compare
from mpillm.infer.scores.exact_sums import in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.tasks.metrics.metric_catalog import make_metrics

ROWS = 700


def score(hits: np.ndarray, losses: np.ndarray) -> Score:
    table = np.stack([losses, np.ones(ROWS), hits], 1)
    metrics = make_metrics(["loss", "accuracy"])
    own = in_batches(np.arange(ROWS), table)
    return score_rows(own, [1], metrics, MPI.COMM_SELF, rows=ROWS)


def test_replicates_are_paired_by_row() -> None:
    chance = np.random.default_rng(0)
    losses = chance.normal(2, 1, (2, ROWS))
    hits = chance.random((2, ROWS)) < [[0.5], [0.65]]
    one, other = (score(h, each) for h, each in zip(hits, losses, strict=True))
    found = compare(one, other)
    weights = draw_weights(np.arange(ROWS), 1000)
    draws = weights @ (hits[1].astype(float) - hits[0]) / weights.sum(1)
    difference = found["accuracy"]
    assert difference.value == pytest.approx(hits[1].mean() - hits[0].mean())
    assert difference.interval == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))))
    shifted = np.abs(draws - draws.mean()) >= abs(difference.value)
    assert difference.p == pytest.approx((shifted.sum() + 1) / 1001)
    assert difference.p < 0.02 < found["loss"].p
    assert list(difference.to_json()) == ["value", "interval", "p"]


def test_other_rows_are_not_compared() -> None:
    one = score(np.ones(ROWS), np.ones(ROWS))
    with pytest.raises(MismatchError, match="scored on 700 rows and the other on 8: only"):
        compare(one, replace(one, rows=8))
