"""Timelines worked out by hand."""

import pytest

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.schedule_catalog import make_schedule
from mpillm.parallel.pipeline.simulate import Costs, simulate


def times(timeline):
    return [[(str(span.action), span.begin, span.end) for span in row] for row in timeline.spans]


def test_two_ranks_by_hand():
    timeline = simulate(make_schedule("1f1b", 2, 2), Costs((1, 2), (2, 3), (1, 1), transfer=0.5))
    assert times(timeline) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 8, 11), ("0B1", 14, 17)],
        [("1F0", 1.5, 3.5), ("1B0", 3.5, 7.5), ("1F1", 7.5, 9.5), ("1B1", 9.5, 13.5)],
    ]
    assert timeline.makespan == 17
    assert timeline.busy == (8, 12)
    assert timeline.bubble == pytest.approx(17 / 10 - 1)
    assert timeline.peaks == (2, 1)


def test_halves_take_their_own_time():
    timeline = simulate(make_schedule("zb-h1", 2, 2), Costs((1, 2), (2, 3), (1, 1)))
    assert times(timeline) == [
        [
            ("0F0", 0, 1),
            ("0F1", 1, 2),
            ("0I0", 6, 8),
            ("0W0", 8, 9),
            ("0I1", 11, 13),
            ("0W1", 13, 14),
        ],
        [
            ("1F0", 1, 3),
            ("1I0", 3, 6),
            ("1F1", 6, 8),
            ("1I1", 8, 11),
            ("1W0", 11, 12),
            ("1W1", 12, 13),
        ],
    ]
    assert timeline.peaks == (2, 2)


def test_a_message_hides_behind_computing_and_is_nothing_within_a_rank():
    slow = Costs.even(4, transfer=5)
    # Rank 1 holds stages 1 and 2: nothing between its two forwards.
    rank_1 = simulate(make_schedule("zb-v", 2, 4), slow).spans[1]
    ends = {str(span.action): span for span in rank_1}
    assert ends["2F0"].begin == ends["1F0"].end
    # GPipe's forwards continue while the first result travels; each waits for its message alone.
    rows = simulate(make_schedule("gpipe", 2, 8), Costs.even(2, transfer=5)).spans
    assert [span.begin for span in rows[0]][:8] == list(range(8))
    assert [span.begin for span in rows[1]][:8] == list(range(6, 14))


def test_costs():
    costs = Costs((1, 2), (3, 4), (5, 6))
    assert [costs.of(Action(1, kind, 0)) for kind in "FBIW"] == [2, 10, 4, 6]
    assert Costs.even(2, 1, 2, 3, 4) == Costs((1, 1), (2, 2), (3, 3), 4)


def test_more_stages_than_activations_at_once():
    assert simulate(make_schedule("interleaved", 2, 4, 2), Costs.even(4)).peaks == (5, 3)


def test_a_deadlock_has_no_timeline():
    row = (Action(1, "F", 0), Action(0, "F", 0), Action(1, "B", 0), Action(0, "B", 0))
    with pytest.raises(LayoutError, match="a deadlock: rank 0 cannot do 1F0"):
        simulate(PipelineSchedule("planted", (row,), 2, 1), Costs.even(2))
    with pytest.raises(LayoutError, match="1F0 on rank 0 needs 0F0; give that to a rank"):
        simulate(PipelineSchedule("planted", ((Action(1, "F", 0),),), 2, 1), Costs.even(2))


def test_costless_work_has_no_bubble():
    assert simulate(make_schedule("1f1b", 2, 2), Costs.even(2, 0, 0, 0)).bubble == 0
