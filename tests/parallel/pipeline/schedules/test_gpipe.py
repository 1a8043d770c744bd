"""GPipe: its bubble, and that it stores every microbatch."""

import pytest

from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("gpipe") == "1f5818c67f8b2e31"


def test_the_bubble():
    for case in grid("gpipe"):
        _, p, m, _ = case
        assert played(case).bubble == pytest.approx((p - 1) / m, abs=1e-12)


def test_it_stores_every_microbatch():
    assert played(("gpipe", 3, 7)).peaks == (7, 7, 7)
