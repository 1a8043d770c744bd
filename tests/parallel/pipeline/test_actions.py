"""Actions: what they need, where their results go, and on which channel."""

from itertools import product

import pytest

from mpillm.parallel.pipeline.actions import Action, RoutedAction
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedules.forward_only import forward_only


def test_what_an_action_needs_and_where_it_goes():
    schedule = make_schedule("zb-v", 2, 4)  # stages 0 and 3 on rank 0, 1 and 2 on rank 1
    assert schedule.needs(Action(0, "F", 1)) is None
    assert schedule.needs(Action(2, "F", 1)) == Action(1, "F", 1)
    assert schedule.needs(Action(3, "I", 1)) == Action(3, "F", 1)
    assert schedule.needs(Action(1, "I", 1)) == Action(2, "I", 1)
    assert schedule.needs(Action(1, "W", 1)) == Action(1, "I", 1)
    assert make_schedule("1f1b", 2, 4).needs(Action(0, "B", 1)) == Action(1, "B", 1)
    targets = [
        schedule.target(Action(stage, kind, 0)) for kind in ("F", "I", "W") for stage in range(4)
    ]
    assert targets == [1, None, 0, None, None, 0, None, 1, None, None, None, None]
    assert schedule.chunk_of == (0, 0, 1, 1)


def test_a_routed_row_by_hand():
    schedule = make_schedule("zb-v", 2, 4)
    assert schedule.channels == ((0, 1), (2, 3), (1, 0), (3, 2))
    row = schedule.routed_row(1)
    assert row.arrivals == {0: (0, 1, 2, 3), 3: (0, 1, 2, 3)}
    routes = {str(routed.action): routed for routed in row.actions}
    assert routes["1F2"] == RoutedAction(Action(1, "F", 2), 0, None, None)
    assert routes["2F2"] == RoutedAction(Action(2, "F", 2), None, 1, Action(1, "F", 2))
    assert routes["2I2"] == RoutedAction(Action(2, "I", 2), 3, None, None)
    assert routes["1I2"] == RoutedAction(Action(1, "I", 2), None, 2, Action(2, "I", 2))
    assert routes["1W2"] == RoutedAction(Action(1, "W", 2), None, None, None)
    ends = {str(routed.action): routed for routed in schedule.routed_row(0).actions}
    assert ends["3F0"] == RoutedAction(Action(3, "F", 0), 1, None, None)
    assert ends["3I0"] == RoutedAction(Action(3, "I", 0), None, 3, None)
    assert schedule.routed_row(1) is row, "made once"


@pytest.mark.parametrize("name", SCHEDULES)
def test_routes_agree_with_needs_and_feeds(name):
    """What one rank sends on a channel is what the other receives, in the same order."""
    for p, m in product((1, 2, 3, 4), (8, 11)):
        whole = make_schedule(name, p, m)
        for schedule in (whole, forward_only(whole, m + 1)):
            assert schedule.channels == whole.channels
            sent: dict[int, list[int]] = {}
            received: dict[int, tuple[int, ...]] = {}
            for rank, row in enumerate(schedule.rows):
                routed = schedule.routed_row(rank)
                assert tuple(each.action for each in routed.actions) == row
                received |= routed.arrivals
                for each in routed.actions:
                    target = schedule.target(each.action)
                    assert (each.send_to is None) == (target is None)
                    if each.send_to is not None:
                        sender, receiver = schedule.channels[each.send_to]
                        assert (sender, schedule.rank_of[receiver]) == (each.action.stage, target)
                        sent.setdefault(each.send_to, []).append(each.action.microbatch)
                    if each.local_input is not None:
                        assert each.local_input == schedule.needs(each.action)
                        assert each.local_input in row
                        assert each.receive_from is None
            assert {channel: tuple(found) for channel, found in sent.items()} == received
