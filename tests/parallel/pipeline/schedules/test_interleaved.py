"""Interleaved 1F1B: its bubble for any number of microbatches, and Megatron-LM's memory."""

import pytest

from mpillm.parallel.pipeline.schedule_rule import split_rounds
from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("interleaved") == "e4716069769c33c6"


def test_the_bubble_for_any_number_of_microbatches():
    for case in grid("interleaved"):
        _, p, m, v = case
        assert played(case).bubble == pytest.approx((p - 1) / (v * m), abs=1e-12)


def test_it_stores_what_megatron_stores():
    for _, p, m, v in (case for case in grid("interleaved") if case[2] % case[1] == 0):
        ahead = [min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) for rank in range(p)]
        assert list(played(("interleaved", p, m, v)).peaks) == ahead


def test_rounds_are_even_and_hold_a_microbatch_a_rank():
    assert split_rounds(4, 12) == [4, 4, 4]
    assert split_rounds(4, 11) == [6, 5]
    assert split_rounds(4, 3) == [3]
