"""The catalogue: all its schedules are complete and run; files and plug-ins; refused numbers."""

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_csv import write_schedule
from mpillm.parallel.pipeline.schedule_rule import ScheduleRule
from mpillm.parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline.blocking import programs, run_blocking
from tests.parallel.pipeline.schedule_sizes import grid


def test_stages_go_round_the_ranks():
    assert make_schedule("1f1b", 4, 8).rank_of == (0, 1, 2, 3)
    assert make_schedule("interleaved", 4, 8).rank_of == (0, 1, 2, 3) * 2


@pytest.mark.slow("plays every schedule at every size")
@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_and_free_of_deadlock(name):
    for case in grid(name):
        schedule = make_schedule(*case)
        assert (schedule.ranks, schedule.microbatches, schedule.stages) == (
            case[1],
            case[2],
            case[1] * case[3],
        )
        check(schedule)
        assert ascending(schedule)
        run_blocking(programs(schedule))


def test_a_file_is_a_schedule_too(folder):
    path = folder / f"own-{MPI.COMM_WORLD.rank}.csv"
    schedule = make_schedule("zb-v", 3, 6)
    path.write_text(write_schedule(schedule))
    for numbers in ((3, 6), (3, 6, 2), (0, 0)):
        assert make_schedule(str(path), *numbers).rows == schedule.rows
    for numbers, words in (
        ((2, 6), "3 ranks, not 2"),
        ((3, 8), "6 microbatches, not 8"),
        ((3, 6, 1), "2 stages a rank, not 1"),
    ):
        with pytest.raises(LayoutError, match=words):
            make_schedule(str(path), *numbers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1b1f", 2, 2), "did you mean 1f1b"),
        (
            ("pipedream-2bw", 2, 2),
            r"known: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v; .*or name a \.csv",
        ),
        (("1f1b", 0, 2), "at least 1 rank and 1 microbatch, not 0 and 2"),
        (("1f1b", 2, 0), "at least 1 rank and 1 microbatch, not 2 and 0"),
        (("1f1b", 2, 2, 2), "1f1b has 1 stage a rank, not 2; .*interleaved"),
        (("interleaved", 2, 2, 1), "2 stages a rank or more, not 1"),
        (("zb-v", 2, 4, 3), "zb-v has 2 stages a rank, not 3"),
        (("zb-v", 2, 4, -1), "not -1"),
        (("interleaved", 4, 3), "at least 4 microbatches, not 3"),
        (("zb-v", 4, 7), "at least 8 microbatches, not 7"),
        (("dualpipe-v", 4, 7), "at least 8 microbatches, not 7"),
    ],
)
def test_what_cannot_be_had(arguments, words):
    with pytest.raises(LayoutError, match=words):
        make_schedule(*arguments)


def _backwards_first(row, p, m, v, r):
    row.add(m, "B0")
    row.add(m, "F0")


def _one_by_one(row, p, m, v, r):
    row.add(m, "F0", "B0")


HERE = "tests.parallel.pipeline.test_schedule_catalog"
ONE_BY_ONE = ScheduleRule(_one_by_one)
BACKWARDS_FIRST = ScheduleRule(_backwards_first)


def test_a_plug_in_is_a_schedule_too():
    schedule = make_schedule(f"{HERE}:ONE_BY_ONE", 2, 3)
    assert write_schedule(schedule) == "0F0,0B0,0F1,0B1,0F2,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    assert simulate(schedule, Costs.even(2)).peaks == (1, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BACKWARDS_FIRST", "rank 0 has 0B0 before 0F0"),
        ("HERE", "must be a ScheduleRule, not str"),
        ("NONE", "has no NONE"),
    ],
)
def test_a_plug_in_that_cannot_run(name, words):
    with pytest.raises(LayoutError, match=words):
        make_schedule(f"{HERE}:{name}", 2, 3)
