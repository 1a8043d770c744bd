import pytest

from mpillm.comm.clock_sync import clock_offset
from mpillm.parallel.parallel_axis import RankTimes
from mpillm.parallel.pipeline.pipeline_axis import measured_bubble
from mpillm.train.trace import measured_costs, trace_events


def test_costs_are_means_over_the_ranks():
    costs = measured_costs(
        2,
        [
            {(0, "F"): 1.0, (0, "B"): 3.0},
            {(0, "F"): 2.0, (1, "F"): 4.0, (1, "I"): 5.0, (1, "W"): 6.0},
        ],
    )
    assert costs.forward == (1.5, 4.0)
    assert costs.backward_input == (3.0, 5.0)
    assert costs.backward_weight == (0.0, 6.0)


def test_the_bubble_is_waiting_over_computing():
    import numpy as np

    begins, ends, busy = (
        np.array([0.0, 1.0, 0.0, 0.0]),
        np.array([6.0, 6.0, 4.0, 4.0]),
        np.array([4.0, 4.0, 4.0, 4.0]),
    )
    times = RankTimes(begins, ends, busy, np.zeros(4))
    assert measured_bubble(times, [[0, 1]]) == pytest.approx(0.5)
    assert measured_bubble(times, [[0, 1], [2, 3]]) == pytest.approx(0.25)
    assert measured_bubble(times, [[0], [1], [2], [3]]) == 0.0


def test_a_trace_begins_at_zero_and_names_what_was_done():
    trace = trace_events(
        [[[("0F1", 10.0, 10.5)]], [[("1W0", 10.5, 11.0), ("update", 11.0, 11.25)]]],
        {0: "a", 1: "b"},
        7,
    )
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [
        (event["tid"], event["name"], event["ts"], event["dur"], event["cat"]) for event in events
    ] == [
        (0, "0F1", 0.0, 5e5, "forward"),
        (1, "1W0", 5e5, 5e5, "backward of the weights"),
        (1, "update", 1e6, 2.5e5, "step"),
    ]
    assert {event["args"]["step"] for event in events} == {7}


def test_ranks_of_one_host_share_a_clock(comm):
    assert clock_offset(comm) == 0.0
