"""Forwards alone: complete, without deadlock, with all ranks busy and few activations waiting."""

import pytest

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedules.forward_only import forward_only
from mpillm.parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline.blocking import programs, run_blocking
from tests.parallel.pipeline.schedule_sizes import grid


@pytest.mark.slow("plays every schedule at every size")
@pytest.mark.parametrize("name", SCHEDULES)
def test_forwards_alone_keep_the_pipeline_full(name):
    for _, p, m, v in grid(name):
        schedule = make_schedule(name, p, m, v)
        for count in {1, 2, m, m + 3}:
            forwards = forward_only(schedule, count)
            assert forwards.rank_of == schedule.rank_of
            check(forwards, forward_only=True)
            assert ascending(forwards)
            run_blocking(programs(forwards))
            makespan = simulate(forwards, Costs.even(schedule.stages)).makespan
            # On a V the last microbatch goes down the ranks and up again.
            v_shaped = schedule.rank_of[-1] == 0 and p > 1
            full = v * count + (p - 1) * (2 if v_shaped else 1)
            assert makespan == max(full, schedule.stages + count - 1)


def test_few_microbatches_wait_in_forwards_alone():
    """A rank of an interleaved pipeline does not run ahead with stage 0."""
    row = forward_only(make_schedule("interleaved", 4, 8, 2), 64).rows[0]
    ahead = 0
    for action in row:
        ahead += 1 if action.stage == 0 else -1
        assert ahead <= 8


def test_no_forwards_of_nothing():
    with pytest.raises(LayoutError, match="at least 1 microbatch, not 0"):
        forward_only(make_schedule("1f1b", 2, 2), 0)
