"""ZB-V: a sixth of 1F1B's bubble, in the memory of its first rank."""

from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("zb-v") == "3f762848c6db8820"


def test_the_stages_form_a_v():
    assert make_schedule("zb-v", 4, 8).rank_of == (0, 1, 2, 3, 3, 2, 1, 0)


def test_makespan_and_memory():
    for case in grid("zb-v", most=24):
        _, p, m, _ = case
        timeline = played(case)
        assert timeline.makespan == 6 * m + p - 1
        assert max(timeline.peaks) <= 2 * p
