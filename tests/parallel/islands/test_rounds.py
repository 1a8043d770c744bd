"""Rounds of islands, and the axis: plain numbers."""

import pytest

from mpillm.errors import LayoutError, RecipeError
from mpillm.models.decoder import DecoderConfig
from mpillm.parallel.axis_sizes import axis_faults, batch_share, legal_layouts, mesh_sizes
from mpillm.parallel.islands.rounds import IslandRounds, check_rounds
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, mesh_order, traffic_bytes

MODEL = DecoderConfig(layers=4, vocab_size=100)


def test_a_round_is_every_so_many_steps_and_the_last_may_be_short() -> None:
    rounds = IslandRounds(every=3, first=3, steps=11)
    assert [done for done in range(12) if rounds.apart(done)] == list(range(3, 12))
    assert [done for done in range(12) if rounds.ends(done)] == [6, 9, 11]
    assert [done for done in range(12) if rounds.open(done)] == [4, 5, 7, 8, 10]
    alone = IslandRounds(every=1, first=0, steps=4)
    assert [done for done in range(5) if alone.ends(done)] == [1, 2, 3, 4]
    assert not any(alone.open(done) for done in range(5))


@pytest.mark.parametrize(
    ("first", "evaluate", "save", "words"),
    [
        (0, 0, 0, ""),
        (20, 30, 40, ""),
        (15, 0, 0, r"parallel\.island_from = 15 .* take 10 or 20"),
        (0, 4, 0, r"train\.evaluate_every = 4 must be a multiple .*_every = 10.* take 10,"),
        (0, 0, 25, r"train\.save_every = 25 .* take 20 or 30"),
    ],
)
def test_evaluations_and_saves_come_at_the_end_of_a_round(
    first: int, evaluate: int, save: int, words: str
) -> None:
    settings = ParallelSettings(island=2, island_every=10, island_from=first)
    if words:
        with pytest.raises(RecipeError, match=words):
            check_rounds(settings, evaluate, save)
        # Without islands there are no rounds.
        settings = ParallelSettings(island_every=10, island_from=first)
    check_rounds(settings, evaluate, save)


def test_islands_are_the_outermost_axis_and_share_the_batch() -> None:
    settings = ParallelSettings(island=2, pipeline=2, island_every=1)
    assert mesh_sizes(settings, 8, MODEL, 8) == {"data": 2, "island": 2, "pipeline": 2}
    # By their messages they would be the innermost axis here.
    order = mesh_order(settings, 8, MODEL, 8)
    assert next(iter(order)) == "island"
    found = traffic_bytes(order, MODEL, 8, 1, settings=settings)
    assert found["island"] == max(found.values())
    places = [{"island": island, "data": data} for island in (0, 1) for data in (0, 1)]
    assert [batch_share(order, each) for each in places] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert batch_share({"data": 1, "pipeline": 1}) == (0, 1)


def test_what_a_batch_cannot_be_shared_by_is_refused() -> None:
    assert axis_faults({"data": 2, "island": 3}, MODEL, 8) == [
        "a global batch of 8 sequences cannot be shared by 3 islands"
    ]
    assert axis_faults({"data": 4, "island": 4}, MODEL, 8) == [
        "a global batch of 8 sequences cannot be shared by 16 ranks (island=4 × data=4)"
    ]
    with pytest.raises(LayoutError, match=r"parallel\.island = 3 × .* must divide the ranks"):
        mesh_sizes(ParallelSettings(island=3), 4, MODEL, 12)
    # Nobody is offered islands who did not ask for them.
    assert all("island" not in sizes for sizes in legal_layouts(8, MODEL, 8))


def test_a_rounds_messages_are_shared_by_its_steps() -> None:
    sizes = {"island": 2, "data": 1, "pipeline": 1}
    once = traffic_bytes(sizes, MODEL, 8, 1, settings=ParallelSettings(island_every=1))["island"]
    assert once == 4 * MODEL.parameters
    rare = ParallelSettings(island_every=50, island_dtype="bfloat16")
    found = traffic_bytes(sizes, MODEL, 8, 1, Precision(), rare)["island"]
    assert found == pytest.approx(once / 100)
