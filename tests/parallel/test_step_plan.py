from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from mpillm.comm.mesh import coordinates
from mpillm.errors import LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.models.spec import LayerRecompute
from mpillm.parallel import axis_sizes
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, plan_step, replica_share

MODEL = DecoderConfig(layers=4, vocab_size=100)


def share(rank: int, sizes: dict[str, int]) -> tuple[int, int]:
    return replica_share(SimpleNamespace(sizes=sizes, coordinates=coordinates(rank, sizes)))


@pytest.mark.parametrize("sizes", [{"data": 3, "pipeline": 2}, {"pipeline": 2, "data": 3}])
def test_the_ranks_of_the_data_axis_hold_the_same_weights(sizes: dict[str, int]) -> None:
    for stage in range(2):
        same = [r for r in range(6) if coordinates(r, sizes)["pipeline"] == stage]
        assert [share(rank, sizes) for rank in same] == [(0, 3), (1, 3), (2, 3)]


def test_a_third_axis_that_does_not_cut_weights_replicates_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    third = SimpleNamespace(name="copies", cuts_weights=False, trains_apart=False)
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES, third))
    sizes = {"data": 2, "pipeline": 2, "copies": 3}
    for stage in range(2):
        same = [r for r in range(12) if coordinates(r, sizes)["pipeline"] == stage]
        assert sorted(share(rank, sizes) for rank in same) == [(i, 6) for i in range(6)]
    cut = SimpleNamespace(name="copies", cuts_weights=True, trains_apart=False)
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES[:-1], cut))
    assert {share(rank, sizes) for rank in range(12)} == {(0, 2), (1, 2)}


def test_without_a_pipeline_the_last_microbatch_may_be_short() -> None:
    plan = plan_step(MODEL, ParallelSettings(), 2, 10, 2)
    assert (plan.rows, plan.microbatches) == (5, 3)
    assert plan.bounds == [(0, 2), (2, 4), (4, 5)]
    assert [(part.first, part.last) for part in plan.parts] == [(0, 4)]


def test_a_pipeline_gets_microbatches_enough() -> None:
    plan = plan_step(MODEL, ParallelSettings(pipeline=2), 1, 32)
    assert plan.microbatches >= 8
    assert plan.timeline.bubble < 0.25
    with pytest.raises(LayoutError, match=r"train\.microbatch = 3 must divide the 8 sequences"):
        plan_step(MODEL, ParallelSettings(pipeline=2), 1, 8, 3)


def test_a_fixed_order_needs_microbatches_in_a_binary_tree() -> None:
    with pytest.raises(LayoutError, match=r"train\.fixed_order sums by microbatch"):
        plan_step(MODEL, ParallelSettings(), 1, 8, fixed_order=True)
    with pytest.raises(LayoutError, match="a power of two, not 3"):
        plan_step(MODEL, ParallelSettings(), 2, 12, 2, fixed_order=True)
    assert plan_step(MODEL, ParallelSettings(), 2, 8, 2, fixed_order=True).fixed_order


@pytest.mark.parametrize(
    ("recompute", "words"),
    [
        (5, r"one layer in 5, and the model has 4; take 1 \(each layer\) to 4"),
        (0, "recompute = 0 recomputes one"),
        (-1, "recompute = -1 recomputes one"),
    ],
)
def test_layers_that_are_not_there_are_not_recomputed(recompute: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        plan_step(MODEL, ParallelSettings(), 1, 8, recompute=recompute)
    for possible in (1, 4, "attention", "full"):
        assert plan_step(MODEL, ParallelSettings(), 1, 8, recompute=possible).recompute == possible


@dataclass(frozen=True)
class Keeping(DecoderConfig):
    recomputes: ClassVar[tuple[LayerRecompute, ...]] = ("full",)
    architecture: str = "my_model:Keeping"


def test_an_architecture_recomputes_what_it_says() -> None:
    assert plan_step(Keeping(), ParallelSettings(), 1, 8, recompute=2).recompute == 2
    with pytest.raises(LayoutError, match="'my_model:Keeping' recomputes full; leave"):
        plan_step(Keeping(), ParallelSettings(), 1, 8, recompute="attention")
    none = type("Keeping", (Keeping,), {"recomputes": ()})
    with pytest.raises(LayoutError, match="'my_model:Keeping' recomputes no activations; leave"):
        plan_step(none(), ParallelSettings(), 1, 8, recompute=1)


def test_recomputed_layers_count_more_where_stages_are_cut() -> None:
    model = DecoderConfig(layers=12, vocab_size=8000)
    kept, again = (
        plan_step(model, ParallelSettings(pipeline=2), 1, 32, recompute=recompute).parts
        for recompute in ("none", "full")
    )
    # Layers weigh more against the head, so its stage takes more of them.
    assert again[1].count > kept[1].count


def test_the_plan_carries_device_and_dtype() -> None:
    plan = plan_step(MODEL, ParallelSettings(), 1, 8, precision=Precision(dtype="bfloat16"))
    assert (plan.precision.device, plan.precision.element_bytes) == ("cpu", 2)
    assert Precision().element_bytes == 4
