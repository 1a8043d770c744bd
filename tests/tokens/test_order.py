"""The order of windows: a bijection, a window that fits, and nothing but (seed, id) in it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpillm.errors import DataError
from mpillm.tokens.order import WindowOrder, mix, permute

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

seeds = st.integers(0, 2**63 - 1)


@given(count=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
def test_a_permutation_hits_everything_once(count, seed, epoch):
    indices = np.arange(count)
    found = permute(indices, count, seed, np.full(count, epoch))
    assert sorted(found.tolist()) == indices.tolist()


@given(count=st.integers(2**33, 2**61), seed=seeds)
def test_a_large_permutation_needs_no_memory_and_stays_inside(count, seed):
    indices = np.arange(500) * (count // 500)
    found = permute(indices, count, seed, np.zeros(500, np.int64))
    assert found.min() >= 0
    assert found.max() < count
    assert len(set(found.tolist())) == 500


def test_a_permutation_scatters():
    """Neighbours are separated, and over the seeds each place is taken about equally often."""
    found = permute(np.arange(10_000), 10_000, 1, np.zeros(10_000, np.int64))
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05
    assert np.mean(np.diff(found) == 1) < 0.01
    first = [
        int(permute(np.zeros(1, np.int64), 10, seed, np.zeros(1, np.int64))[0])
        for seed in range(2000)
    ]
    assert np.bincount(first, minlength=10).min() > 120


@given(
    n_tokens=st.integers(2, 5000),
    context=st.integers(1, 300),
    seed=seeds,
    first=st.integers(0, 10**6),
    data=st.data(),
)
def test_every_window_fits_and_an_epoch_takes_each_once(n_tokens, context, seed, first, data):
    context = min(context, n_tokens - 1)
    order = WindowOrder(n_tokens, context, seed)
    epoch = first // order.n_windows
    starts = order.starts(np.arange(order.n_windows) + epoch * order.n_windows)
    assert starts.min() >= 0
    assert starts.max() + context + 1 <= n_tokens
    assert set(np.diff(np.sort(starts)).tolist()) <= {context}
    assert starts.min() < context
    # Any rows in any company: a rank's share, or one alone, is the same as in the whole.
    some = data.draw(st.lists(st.integers(0, order.n_windows - 1), max_size=5))
    alone = [int(order.starts(np.array([i + epoch * order.n_windows]))[0]) for i in some]
    assert alone == starts[some].tolist()


def test_epochs_and_seeds_differ():
    order, other = WindowOrder(100_000, 64, 0), WindowOrder(100_000, 64, 1)
    ids = np.arange(order.n_windows)
    assert (order.starts(ids) != order.starts(ids + order.n_windows)).mean() > 0.9
    assert (order.starts(ids) != other.starts(ids)).mean() > 0.9
    assert (
        len({int(order.starts(ids + e * order.n_windows).min()) for e in range(8)}) > 1
    )  # the phase moves


def test_the_order_never_changes():
    """Figures kept here: a change would give every resumed run other data."""
    assert mix(np.arange(2, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert WindowOrder(100_000, 64, 7).starts(np.array([0, 1, 1561, 10**9])).tolist() == [
        49817,
        59033,
        15582,
        45414,
    ]


def test_too_short_a_dataset_says_its_numbers():
    with pytest.raises(
        DataError, match=r"context 64 is 65 tokens, the dataset has 64; .* lower the context to 63"
    ):
        WindowOrder(64, 64, 0)
    assert WindowOrder(65, 64, 0).starts(np.arange(5)).tolist() == [0] * 5
