"""A step has the tokens of many texts, prompts leave room for decoding, pages run out in order."""

import random

from mpillm.infer.serve.engine.page_pool import PagePool
from mpillm.infer.serve.engine.row_plan import RowPlan
from mpillm.infer.serve.engine.scheduler import (
    RowPiece,
    Scheduler,
    SchedulerSettings,
    TextRow,
    Wanted,
)


def scheduler(pages: int = 32, page_tokens: int = 4, **settings: int) -> Scheduler:
    return Scheduler(PagePool(pages, page_tokens), SchedulerSettings(**settings))


def row(number: int, prompt: list[int], most: int = 4) -> TextRow:
    return TextRow(number, list(prompt), len(prompt), most)


def step(made: Scheduler) -> list[RowPiece]:
    """Compute a step of a model that always draws 7."""
    pieces = made.plan()
    made.done(pieces)
    for piece in pieces:
        if piece.wanted == Wanted.LAST_LOGITS:
            piece.row.tokens.append(7)
            if piece.row.drawn == piece.row.most:
                made.remove(piece.row)
    return pieces


def test_a_prompt_is_read_in_chunks_next_to_texts_that_decode() -> None:
    made = scheduler(step_tokens=8, chunk_tokens=3)
    short, long = row(1, [1, 2]), row(2, list(range(20)))
    made.add(short)
    made.add(long)
    assert [(p.row.number, p.first, p.count) for p in step(made)] == [(1, 0, 2), (2, 0, 6)]
    assert [(p.row.number, p.first, p.count) for p in step(made)] == [(1, 2, 1), (2, 6, 3)]
    assert [p.count for p in step(made)] == [1, 3]
    assert [p.count for p in step(made)] == [1, 3]
    # The short one has ended: the rest of the long prompt has the whole step.
    assert [(p.row.number, p.first, p.count) for p in step(made)] == [(2, 15, 5)]


def test_a_single_position_of_a_prompt_is_among_those_that_decode() -> None:
    made = scheduler(step_tokens=8, chunk_tokens=4)
    made.add(row(1, list(range(11))))
    step(made)
    made.add(row(2, [*range(8), 20, 21, 22, 23]))
    # Three positions are left of the first prompt, and pages hold the beginning of the second.
    made.settings = SchedulerSettings(step_tokens=4)
    pieces = made.plan()
    assert [(p.row.number, p.first, p.count) for p in pieces] == [(2, 8, 1), (1, 8, 3)]


def test_a_shared_prefix_is_computed_once_even_for_texts_that_come_together() -> None:
    made = scheduler()
    prompt = list(range(10))
    rows = [row(number, prompt) for number in (1, 2, 3)]
    for each in rows:
        made.add(each)
    assert [(p.row.number, p.count) for p in step(made)] == [(1, 10)]
    assert [(p.row.number, p.first) for p in step(made)] == [(1, 10), (2, 8), (3, 8)]
    assert [each.cached for each in rows] == [0, 8, 8]
    assert rows[0].pages[:2] == rows[1].pages[:2] == rows[2].pages[:2]


def test_a_whole_prompt_in_the_cache_has_its_last_token_computed() -> None:
    made = scheduler()
    made.add(row(1, list(range(8)), most=1))
    step(made)
    again = row(2, list(range(8)), most=1)
    made.add(again)
    [piece] = step(made)
    assert (piece.first, piece.count) == (4, 4)


def test_a_prompt_whose_logits_are_asked_is_computed_whole() -> None:
    made = scheduler()
    made.add(row(1, list(range(8)), most=1))
    step(made)
    again = row(2, list(range(8)), most=1)
    again.reads = Wanted.ALL_LOGITS
    made.add(again)
    [piece] = made.plan()
    assert (piece.first, piece.count, piece.wanted) == (0, 8, Wanted.ALL_LOGITS)


def test_the_last_text_is_preempted_and_ends_all_the_same() -> None:
    made = scheduler(pages=5, page_tokens=2)
    first, second = row(1, [1, 2, 3], most=7), row(2, [4, 5, 6], most=3)
    made.add(first)
    made.add(second)
    order = [[p.row.number for p in step(made)] for _ in range(12)]
    assert made.preempted == 1
    assert order[:2] == [[1, 2], [1, 2]]
    assert (first.drawn, second.drawn) == (7, 3)
    assert made.pool.used == 0


def test_a_text_that_waits_for_pages_lets_no_other_pass() -> None:
    made = scheduler(pages=4, page_tokens=2)
    for number, prompt in enumerate(([1] * 5, [2] * 4, [3]), start=1):
        made.add(row(number, prompt, most=2))
    assert [p.row.number for p in step(made)] == [1]
    assert [each.number for each in made.waiting] == [2, 3]


def test_random_texts_all_end_and_pages_come_back() -> None:
    draw = random.Random(3)
    made = scheduler(pages=24, page_tokens=2, step_tokens=16, chunk_tokens=5, most_rows=6)
    rows: list[TextRow] = []
    for number in range(200):
        prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
        most = draw.randrange(1, 12)
        rows.append(row(number, prompt, most))
        made.add(rows[-1])
        for _ in range(draw.randrange(4)):
            pieces = step(made)
            assert len({id(piece.row) for piece in pieces}) == len(pieces)
            assert sum(piece.count for piece in pieces) <= 16 + 6
        open_rows = [*made.running, *made.waiting]
        if open_rows and draw.random() < 0.3:
            cancelled = draw.choice(open_rows)
            made.remove(cancelled)
            rows.remove(cancelled)
    while made.running or made.waiting:
        assert step(made), "texts that run have something to compute"
    assert all(each.drawn == each.most for each in rows)
    assert made.pool.used == 0
    assert made.preempted


def test_a_plan_is_read_as_it_was_written() -> None:
    made = scheduler()
    made.add(row(1, [5, 6, 7, 8, 9]))
    step(made)
    made.add(row(2, [1, 2, 3]))
    plan = RowPlan.of(made.plan(), 4)
    assert [(each.first, each.tokens, len(each.pages)) for each in plan.rows] == [
        (5, (7,), 2),
        (0, (1, 2, 3), 1),
    ]
    assert RowPlan.decode(plan.encode()) == plan
