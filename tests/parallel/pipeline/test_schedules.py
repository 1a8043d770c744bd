"""Every schedule over a grid of sizes: complete, no deadlock, bubble and peak of the literature."""

import hashlib
from itertools import product

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_csv import write_schedule
from mpillm.parallel.pipeline.schedule_rule import ScheduleRule
from mpillm.parallel.pipeline.schedules.forward_only import forward_only
from mpillm.parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline.blocking import programs, run_blocking

V_SHAPED = ("zb-v", "dualpipe-v")
LEAST = {"interleaved": 1, "zb-v": 2, "dualpipe-v": 2}
# Of all rows for p to 8 and m to 16, as of 2026-11-29. A change here changes what every run does.
DIGESTS = {
    "gpipe": "1f5818c67f8b2e31",
    "1f1b": "166b868143a6d05a",
    "interleaved": "e4716069769c33c6",
    "zb-h1": "c46d094c867d928a",
    "zb-v": "3f762848c6db8820",
    "dualpipe-v": "6b08619888f6696b",
}


def sizes(*names, most=16):
    """List (name, p, m, v) of all sizes that the schedules allow."""
    return [
        (name, p, m, v)
        for name, p, m in product(names, range(1, 9), range(1, most + 1))
        if m >= LEAST.get(name, 0) * p
        for v in ((2, 3, 4) if name == "interleaved" else (2,) if name in V_SHAPED else (1,))
    ]


def grid(*names, most=16):
    """List this rank's share of `sizes`; a rank that fails ends the job."""
    return sizes(*names, most=most)[MPI.COMM_WORLD.rank :: MPI.COMM_WORLD.size]


def played(case, **costs):
    schedule = make_schedule(*case)
    return simulate(schedule, Costs.even(schedule.stages, **costs))


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rows_stay_the_same(name):
    digest = hashlib.sha256()
    for case in sizes(name):
        digest.update(write_schedule(make_schedule(*case)).encode() + b"\n")
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_placement(name):
    schedule = make_schedule(name, 4, 8)
    down = [0, 1, 2, 3]
    back = [3, 2, 1, 0] if name in V_SHAPED else down
    assert list(schedule.rank_of) == (down + back)[: schedule.stages]


def test_the_bubble_of_gpipe_and_1f1b():
    for case in grid("gpipe", "1f1b"):
        _, p, m, _ = case
        assert played(case).bubble == pytest.approx((p - 1) / m, abs=1e-12)


def test_1f1b_stores_no_more_than_the_ranks_behind():
    for case in grid("1f1b"):
        _, p, m, _ = case
        assert played(case).peaks == tuple(min(m, p - rank) for rank in range(p))
    assert played(("gpipe", 3, 7)).peaks == (7, 7, 7)


def test_the_bubble_of_interleaved_for_any_number_of_microbatches():
    for case in grid("interleaved"):
        _, p, m, v = case
        assert played(case).bubble == pytest.approx((p - 1) / (v * m), abs=1e-12)


def test_interleaved_stores_what_megatron_stores():
    for _, p, m, v in (case for case in grid("interleaved") if case[2] % case[1] == 0):
        ahead = [min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) for rank in range(p)]
        assert list(played(("interleaved", p, m, v)).peaks) == ahead


def test_zb_h1_has_a_third_of_the_bubble_and_stores_as_many():
    for case in (case for case in grid("zb-h1") if case[2] >= case[1]):
        _, p, m, _ = case
        timeline = played(case)
        assert timeline.makespan == 3 * m + p - 1
        assert timeline.bubble == pytest.approx(played(("1f1b", p, m)).bubble / 3, abs=1e-12)
        assert max(timeline.peaks) <= p


def test_zb_h1_at_other_costs():
    """(p−1)(F+I−W) where W is the shortest; else the shortest takes its place."""
    for f, i, w in product((1, 2, 3), repeat=3):
        for p, m in ((2, 2), (3, 7), (5, 5), (6, 12)):
            timeline = played(("zb-h1", p, m), forward=f, backward_input=i, backward_weight=w)
            assert timeline.makespan - m * (f + i + w) == (p - 1) * (f + i - min(f, i, w))


def test_the_v_shaped_ones():
    for case in grid("zb-v", "dualpipe-v", most=24):
        name, p, m, _ = case
        timeline = played(case)
        assert timeline.makespan == 6 * m + p - 1
        assert max(timeline.peaks) <= 2 * p + (name == "dualpipe-v")


def test_dualpipe_v_mostly_does_whole_backwards():
    def halves(name):
        return [
            sum(action.kind == "I" for action in row) for row in make_schedule(name, 4, 20).rows
        ]

    assert halves("dualpipe-v") == [7, 6, 5, 4]
    assert any(halves("zb-v"))
    assert not any(halves("1f1b"))


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
            full = v * count + (p - 1) * (2 if name in V_SHAPED else 1)
            assert makespan == max(full, schedule.stages + count - 1)


def test_few_microbatches_lie_waiting_in_forwards_alone():
    """A rank of an interleaved pipeline does not race ahead with stage 0."""
    row = forward_only(make_schedule("interleaved", 4, 8, 2), 64).rows[0]
    ahead = 0
    for action in row:
        ahead += 1 if action.stage == 0 else -1
        assert ahead <= 8


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


HERE = "tests.parallel.pipeline.test_schedules"
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
        ("DIGESTS", "must be a ScheduleRule, not dict"),
        ("NONE", "has no NONE"),
    ],
)
def test_a_plug_in_that_cannot_run(name, words):
    with pytest.raises(LayoutError, match=words):
        make_schedule(f"{HERE}:{name}", 2, 3)


def test_no_forwards_of_nothing():
    with pytest.raises(LayoutError, match="at least 1 microbatch, not 0"):
        forward_only(make_schedule("1f1b", 2, 2), 0)
