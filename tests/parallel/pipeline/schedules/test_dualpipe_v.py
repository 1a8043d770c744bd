"""DualPipe-V: the makespan of ZB-V with mostly whole backwards, and half a microbatch more."""

from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from tests.parallel.pipeline.schedule_sizes import grid, played, rows_digest


def test_the_rows_stay_the_same():
    assert rows_digest("dualpipe-v") == "6b08619888f6696b"


def test_the_stages_form_a_v():
    assert make_schedule("dualpipe-v", 4, 8).rank_of == (0, 1, 2, 3, 3, 2, 1, 0)


def test_makespan_and_memory():
    for case in grid("dualpipe-v", most=24):
        _, p, m, _ = case
        timeline = played(case)
        assert timeline.makespan == 6 * m + p - 1
        assert max(timeline.peaks) <= 2 * p + 1


def test_mostly_whole_backwards():
    def halves(name):
        return [
            sum(action.kind == "I" for action in row) for row in make_schedule(name, 4, 20).rows
        ]

    assert halves("dualpipe-v") == [7, 6, 5, 4]
    assert any(halves("zb-v"))
    assert not any(halves("1f1b"))
