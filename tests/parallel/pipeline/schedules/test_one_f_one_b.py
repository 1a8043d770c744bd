"""1F1B: GPipe's bubble, with as many activations as there are ranks from this one on."""

import pytest

from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("1f1b") == "166b868143a6d05a"


def test_the_bubble():
    for case in grid("1f1b"):
        _, p, m, _ = case
        assert played(case).bubble == pytest.approx((p - 1) / m, abs=1e-12)


def test_a_rank_stores_one_microbatch_for_itself_and_each_later_rank():
    for case in grid("1f1b"):
        _, p, m, _ = case
        assert played(case).peaks == tuple(min(m, p - rank) for rank in range(p))
