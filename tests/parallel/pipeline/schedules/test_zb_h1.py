"""ZB-H1: a third of 1F1B's bubble, in the memory of its first rank."""

from itertools import product

import pytest

from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("zb-h1") == "c46d094c867d928a"


def test_a_third_of_the_bubble_and_as_many_activations():
    for case in (case for case in grid("zb-h1") if case[2] >= case[1]):
        _, p, m, _ = case
        timeline = played(case)
        assert timeline.makespan == 3 * m + p - 1
        assert timeline.bubble == pytest.approx(played(("1f1b", p, m)).bubble / 3, abs=1e-12)
        assert max(timeline.peaks) <= p


def test_other_costs():
    """The ranks wait (p−1)(F+I−W) where W is the shortest; else the shortest takes its place."""
    for f, i, w in product((1, 2, 3), repeat=3):
        for p, m in ((2, 2), (3, 7), (5, 5), (6, 12)):
            timeline = played(("zb-h1", p, m), forward=f, backward_input=i, backward_weight=w)
            assert timeline.makespan - m * (f + i + w) == (p - 1) * (f + i - min(f, i, w))
