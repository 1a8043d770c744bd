"""Sums of rows, compared with exact fractions, however ranks share the rows."""

import math
from fractions import Fraction

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.infer.scores.exact_sums import ExactSums, OwnRows
from mpillm.tasks.metrics.metric import RowStatistics

ROWS, BATCH = 103, 10


def statistics() -> np.ndarray:
    """Make columns of loss, of counts, of tiny and of huge numbers, and one with zeros alone."""
    chance = np.random.default_rng(4)
    columns = [
        chance.normal(3, 2, ROWS).astype(np.float32),
        chance.integers(0, 5, ROWS),
        chance.normal(size=ROWS) * 1e-12,
        chance.lognormal(0, 20, ROWS),
        np.zeros(ROWS),
        np.where(np.arange(ROWS) == 70, 1, 0),
    ]
    return np.stack(columns, 1)


def shared(table: np.ndarray, rank: int, ranks: int) -> list[OwnRows]:
    """Give rank `rank` its batches of the rows."""
    firsts = range(BATCH * rank, len(table), BATCH * ranks)
    return [
        OwnRows(np.arange(ROWS)[a : a + BATCH], RowStatistics.joined([table[a : a + BATCH]]))
        for a in firsts
    ]


def weights(numbers: np.ndarray) -> np.ndarray:
    """Give each row a weight of its own in each of 7 replicates."""
    return np.stack([(numbers * (3 + each)) % 11 for each in range(7)]).astype(np.float64)


def test_sums_are_exact_and_the_same_bits_at_any_number_of_ranks(comm: MPI.Intracomm) -> None:
    table = statistics()
    whole = ExactSums(shared(table, 0, 1), MPI.COMM_SELF)
    together = ExactSums(shared(table, comm.rank, comm.size), comm)
    np.testing.assert_array_equal(together.whole(), whole.whole())
    exact = [float(sum(map(Fraction, column))) for column in table.T]
    np.testing.assert_allclose(whole.whole(), exact, rtol=1e-15)
    np.testing.assert_array_equal(together.weighted(weights, 7), whole.weighted(weights, 7))
    np.testing.assert_allclose(
        whole.weighted(weights, 7), weights(np.arange(ROWS)) @ table, rtol=1e-11
    )


def test_ranks_may_share_the_positions_of_rows(comm: MPI.Intracomm) -> None:
    """Each rank has a share of the statistics of every row."""
    shares = np.random.default_rng(2).dirichlet(np.ones(comm.size), ROWS)
    own = statistics() * shares[:, comm.rank, None]
    sums = ExactSums(shared(own, 0, 1), comm)
    np.testing.assert_allclose(sums.whole(), statistics().sum(0), rtol=1e-12)
    np.testing.assert_allclose(
        sums.weighted(weights, 7), weights(np.arange(ROWS)) @ statistics(), rtol=1e-10
    )


def test_a_rank_without_rows_gets_the_sums(comm: MPI.Intracomm) -> None:
    own = shared(statistics(), 0, 1) if comm.rank == comm.size - 1 else []
    assert ExactSums(own, comm).whole()[1] == statistics()[:, 1].sum()
    assert ExactSums([], comm).width == 0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_its_own_column_alone(
    comm: MPI.Intracomm, odd: float
) -> None:
    table = statistics()
    table[33, 0] = odd
    sums = ExactSums(shared(table, comm.rank, comm.size), comm)
    for found in (sums.whole()[None], sums.weighted(weights, 7)):
        assert np.isnan(found[:, 0]).all()
        assert np.isfinite(found[:, 1:]).all()
