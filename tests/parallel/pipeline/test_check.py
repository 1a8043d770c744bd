"""Faults are found: each kind planted by hand, then random ones, compared with a slow oracle."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.check import ascending, check
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from tests.parallel.pipeline.blocking import Step, programs, run_blocking


def action(text):
    at = next(index for index, letter in enumerate(text) if letter.isalpha())
    return Action(int(text[:at]), text[at], int(text[at + 1 :]))


def schedule(*rows, stages=2, microbatches=2):
    return PipelineSchedule(
        "planted", tuple(tuple(map(action, row.split())) for row in rows), stages, microbatches
    )


FAULTS = {
    "rank 1 has 1F0 twice": ("0F0 0F1 0B0 0B1", "1F0 1F0 1B0 1F1 1B1"),
    "stage 1 needs F, and B or both I and W with microbatch 0, and has F on rank 1": (
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B1",
    ),
    "stage 0 needs .* with microbatch 1, and has B on rank 0": ("0F0 0B0 0B1", "1F0 1B0 1F1 1B1"),
    "microbatch 0, and has F, B, W": ("0F0 0F1 0B0 0B1", "1F0 1B0 1W0 1F1 1B1"),
    "microbatch 0, and has F, I on": ("0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1B1"),
    "stage 1 is on rank 0 and on rank 1 .with 1F0.": ("0F0 0F1 1B1 0B0 0B1", "1F0 1B0 1F1"),
    "stage 1 of 2 is on no rank": ("0F0 0F1 0B0 0B1",),
    "rank 1 does nothing": ("0F0 0F1 0B0 0B1 1F0 1F1 1B0 1B1", ""),
    "rank 1 has 2F0, but stages go from 0 to 1": ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1 2F0"),
    "rank 0 has 0F2, but .* microbatches to 1": ("0F0 0F1 0B0 0B1 0F2", "1F0 1B0 1F1 1B1"),
    "rank 1 has 1B0 before 1F0": ("0F0 0F1 0B0 0B1", "1B0 1F0 1F1 1B1"),
    "rank 1 has 1W0 before 1I0": ("0F0 0F1 0B0 0B1", "1F0 1W0 1I0 1F1 1B1"),
    "rank 0 has 0W1 before 0I1": ("0F0 0F1 0B0 0W1 0I1", "1F0 1B0 1F1 1B1"),
    "from stage 0 to stage 1 .* rank 0 does 0F0 where rank 1 does 1F1": (
        "0F0 0F1 0B0 0B1",
        "1F1 1F0 1B0 1B1",
    ),
    "from stage 1 to stage 0 .* rank 1 does 1B1 where rank 0 does 0B0": (
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B1 1B0",
    ),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_planted_fault_is_named(words):
    with pytest.raises(LayoutError, match=words):
        check(schedule(*FAULTS[words]))


def test_what_is_right_passes():
    check(schedule("0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1W0 1B1"))
    check(schedule("0F0 0F1 1F0 1F1 1B1 0B1 1B0 0B0"))
    check(schedule("0F0 0F1", "1F0 1F1"), forward_only=True)
    with pytest.raises(LayoutError, match="needs F with microbatch 0, and has F, B"):
        check(schedule("0F0 0F1 0B0", "1F0 1F1"), forward_only=True)
    with pytest.raises(LayoutError, match="and has F on"):
        check(schedule("0F0 0F1", "1F0 1F1"))


def test_a_deadlock_shows_its_cycle():
    with pytest.raises(LayoutError) as caught:
        check(schedule("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"))
    assert (
        "rank 0 cannot do 0B0 before rank 1 does 1B0, which comes after 1F1 there, "
        "which needs 0F1, which comes after 0B0 on rank 0"
    ) in str(caught.value)


def test_cycles_of_three_ranks_of_two_and_of_one():
    rows = "0F0 0B0 3F0 3B0", "1F0 1B0", "2F0 2B0"
    with pytest.raises(LayoutError) as caught:
        check(schedule(*rows, stages=4, microbatches=1))
    assert (
        "rank 0 cannot do 0B0 before rank 1 does 1B0, which needs 2B0 of rank 2, "
        "which needs 3B0, which comes after 0B0 on rank 0"
    ) in str(caught.value)
    # Rank 0 waits too, but outside the cycle.
    rows = "0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", "2F0 2B0 2F1 2B1", "3F0 3F1 3B0 3B1"
    with pytest.raises(LayoutError, match="0F1, which comes after 0B0 on rank 0"):
        check(schedule(*rows, stages=4))
    rows = "0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1", "2F0 2B0 2F1 2B1", "3F0 3F1 3B0 3B1"
    with pytest.raises(
        LayoutError,
        match="rank 2 cannot do 2B0 before rank 3 does 3B0, which comes after 3F1 there",
    ):
        check(schedule(*rows, stages=4))
    with pytest.raises(
        LayoutError,
        match="rank 0 cannot do 1F0 before rank 0 does 0F0, which comes after 1F0 on rank 0",
    ):
        check(schedule("1F0 0F0 1B0 0B0", microbatches=1))


def test_ascending():
    assert ascending(schedule("0F0 0F1 0B0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"))
    assert not ascending(schedule("0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"))
    assert not ascending(schedule("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1I1 1W1 1W0"))
    assert not ascending(schedule("0F1 0F0 0B0 0B1", "1F1 1F0 1B0 1B1"))


def test_programs_weave_in_the_messages():
    steps = [
        [str(step) for step in steps]
        for steps in programs(schedule("0F0 0B0", "1F0 1I0 1W0", microbatches=1))
    ]
    assert steps == [
        ["compute 0F0", "send 0F0 to rank 1", "receive 1I0 from rank 1", "compute 0B0"],
        [
            "receive 0F0 from rank 0",
            "compute 1F0",
            "compute 1I0",
            "send 1I0 to rank 0",
            "compute 1W0",
        ],
    ]


def test_sends_that_wait_would_lock_if_each_row_minded_only_itself():
    """Why `programs` keeps one order for all: send at once, receive when needed, and 1F1B locks."""
    plan = make_schedule("1f1b", 2, 4)
    naive: list[list[Step]] = []
    for rank, row in enumerate(plan.rows):
        naive.append([])
        for cell in row:
            needed = plan.needs(cell)
            if needed is not None and plan.rank_of[needed.stage] != rank:
                naive[rank].append(Step("receive", needed, plan.rank_of[needed.stage]))
            naive[rank].append(Step("compute", cell))
            target = plan.target(cell)
            if target is not None:
                naive[rank].append(Step("send", cell, target))
    with pytest.raises(
        LayoutError,
        match=r"rank 0 waits to send 0F\d to rank 1, rank 1 waits to send 1B\d to rank 0",
    ):
        run_blocking(naive)
    run_blocking(programs(plan))


def test_the_machine_sees_what_is_wrong():
    right = programs(make_schedule("1f1b", 2, 2))
    lost = [[step for step in steps if str(step) != "send 0F1 to rank 1"] for steps in right]
    with pytest.raises(LayoutError, match="lock"):
        run_blocking(lost)
    deaf = [right[0], [step for step in right[1] if str(step) != "receive 0F1 from rank 0"]]
    with pytest.raises(LayoutError, match="lock: rank 0 waits to send 0F1 to rank 1"):
        run_blocking(deaf)
    with pytest.raises(LayoutError, match="computes 0B0 without 1B0 or 1I0"):
        run_blocking([[Step("compute", action(text)) for text in ("0F0", "0B0", "1F0", "1B0")]])
    with pytest.raises(
        LayoutError, match="would send 0F0 to rank 1, and rank 1 receive 0F1 from rank 0"
    ):
        run_blocking(
            [
                [Step("compute", action("0F0")), Step("send", action("0F0"), 1)],
                [Step("receive", action("0F1"), 0)],
            ]
        )
    with pytest.raises(
        LayoutError, match="rank 0 waits to receive 1B0 from rank 1, and rank 1 has ended"
    ):
        run_blocking([[Step("receive", action("1B0"), 1)], []])


def sound(plan):
    """Return whether `plan` can run, the slow way: try every rank until none advances."""
    every = [(rank, cell) for rank, row in enumerate(plan.rows) for cell in row]
    if len({(cell.stage, rank) for rank, cell in every}) != plan.stages:
        return False
    kinds = Counter((cell.stage, cell.microbatch, cell.kind) for _, cell in every)
    for pair in product(range(plan.stages), range(plan.microbatches)):
        if "".join(kind * kinds.pop((*pair, kind), 0) for kind in "FBIW") not in ("FB", "FIW"):
            return False
    if kinds:
        return False
    done: set[Action] = set()
    left = [list(row) for row in plan.rows]
    while any(left):
        free = [row for row in left if row and ready(plan, row[0], done)]
        if not free:
            return False
        for row in free:
            done.add(row.pop(0))
    return in_order(plan)


def ready(plan, cell, done):
    stage, microbatch = cell.stage, cell.microbatch
    if cell.kind == "F":
        return stage == 0 or Action(stage - 1, "F", microbatch) in done
    if cell.kind == "W":
        return Action(stage, "I", microbatch) in done
    behind = {Action(stage + 1, kind, microbatch) for kind in "BI"}
    return Action(stage, "F", microbatch) in done and (
        stage == plan.stages - 1 or bool(behind & done)
    )


def in_order(plan):
    def microbatches(stage, kinds):
        return [
            cell.microbatch
            for row in plan.rows
            for cell in row
            if cell.stage == stage and cell.kind in kinds
        ]

    return all(
        microbatches(stage, kinds) == microbatches(stage + 1, kinds)
        for stage, kinds in product(range(plan.stages - 1), ("F", "BI"))
        if plan.rank_of[stage] != plan.rank_of[stage + 1]
    )


def disturbed(plan, changes):
    """Return `plan` with changes: each is (what, two numbers that say where)."""
    rows = [list(row) for row in plan.rows]
    for what, a, b in changes:
        row, other = rows[a % len(rows)], rows[b % len(rows)]
        if not row:
            continue
        at, to = a // len(rows) % len(row), b // len(rows) % len(row)
        if what == "swap":
            row[at], row[to] = row[to], row[at]
        elif what == "neighbours":
            row[at - 1], row[at] = row[at], row[at - 1]
        elif what == "drop":
            row.pop(at)
        elif what == "double":
            row.insert(to, row[at])
        elif what == "move":
            other.append(row.pop(at))
        else:
            row[at] = replace(row[at], microbatch=to % (plan.microbatches + 1))
    return replace(plan, rows=tuple(map(tuple, rows)))


PLACE = st.integers(0, 10_000)
CHANGE = st.tuples(
    st.sampled_from(["swap", "neighbours", "neighbours", "drop", "double", "move", "rename"]),
    PLACE,
    PLACE,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(tuple(SCHEDULES)),
    st.integers(1, 3),
    st.integers(0, 2),
    st.lists(CHANGE, max_size=3),
)
def test_whatever_breaks_a_schedule_is_found_and_nothing_else(name, ranks, more, changes):
    plan = disturbed(make_schedule(name, ranks, 2 * ranks + more), changes)
    if not sound(plan):
        with pytest.raises(LayoutError):
            check(plan)
        return
    check(plan)
    run_blocking(programs(plan))
