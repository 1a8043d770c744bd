"""Sizes and legality of the mesh axes, with a third axis added to the two that exist."""

import numpy as np
import pytest

from mpillm.errors import LayoutError
from mpillm.models.decoder import DecoderConfig
from mpillm.parallel import axis_sizes
from mpillm.parallel.axis_sizes import axis_faults, counts_loss, legal_layouts, mesh_sizes
from mpillm.parallel.data.data_axis import DataAxis
from mpillm.parallel.parallel_axis import ParallelAxis, RankTimes
from mpillm.parallel.pipeline.pipeline_axis import PipelineAxis
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import traffic_bytes

MODEL = DecoderConfig(layers=4, vocab_size=100)


class Copies(ParallelAxis):
    """An axis whose ranks repeat the same work."""

    name = "copies"
    repeats_loss = True

    def wanted(self, settings: ParallelSettings) -> int:
        return 2

    def shares(self, model, batch):
        return "nothing"

    def fault(self, size, model, batch):
        return "" if size <= 2 else f"{size} copies are too many"

    def traffic_bytes(self, sizes, model, batch, chunks, element):
        return 7.0 * sizes[self.name]

    def wait_seconds(self, times, groups):
        return float(sum(times.busy[list(group)].max() for group in groups))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES, Copies()))


def test_data_takes_what_the_other_axes_leave() -> None:
    assert mesh_sizes(ParallelSettings(pipeline=2), 8, MODEL, 8) == {"data": 4, "pipeline": 2}
    assert mesh_sizes(ParallelSettings(), 3, MODEL, 9) == {"data": 3, "pipeline": 1}


def test_a_third_axis_divides_the_ranks_too(three: None) -> None:
    settings = ParallelSettings(pipeline=2)
    assert mesh_sizes(settings, 8, MODEL, 8) == {"data": 2, "pipeline": 2, "copies": 2}
    with pytest.raises(
        LayoutError, match=r"parallel\.pipeline = 2 × parallel\.copies = 2 must divide"
    ):
        mesh_sizes(settings, 6, MODEL, 8)


def test_an_optional_axis_of_one_rank_is_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "wanted", lambda self, settings: 1)
    monkeypatch.setattr(axis_sizes, "AXES", (*axis_sizes.AXES, Copies()))
    assert mesh_sizes(ParallelSettings(), 4, MODEL, 8) == {"data": 4, "pipeline": 1}
    with pytest.raises(LayoutError, match=r"or data=2 × pipeline=2 \(parallel"):
        mesh_sizes(ParallelSettings(pipeline=4), 4, MODEL.replace(layers=3), 8)


def test_legal_layouts_are_all_products_over_the_axes(three: None) -> None:
    found = legal_layouts(8, MODEL, 8, (DataAxis(), PipelineAxis(), Copies()))
    assert all(np.prod(list(sizes.values())) == 8 for sizes in found)
    assert {"data": 2, "pipeline": 2, "copies": 2} in found
    assert all(sizes["copies"] <= 2 and sizes["pipeline"] <= 4 for sizes in found)
    assert len(found) == len({tuple(sizes.items()) for sizes in found}) == 6


def test_each_axis_says_why_it_does_not_fit(three: None) -> None:
    faults = axis_faults({"data": 3, "pipeline": 5, "copies": 4}, MODEL, 8)
    assert faults == [
        "a global batch of 8 sequences cannot be shared by 3 ranks",
        "4 layers cannot be shared by 5 stages",
        "4 copies are too many",
    ]
    assert axis_faults({}, MODEL, 8) == []


def test_traffic_is_a_number_an_axis(three: None) -> None:
    found = traffic_bytes({"data": 2, "pipeline": 2, "copies": 2}, MODEL, 8, 1)
    assert list(found) == ["data", "pipeline", "copies"]
    assert found["copies"] == 14.0
    alone = traffic_bytes({"data": 1, "pipeline": 1, "copies": 1}, MODEL, 8, 1)
    assert (alone["data"], alone["pipeline"]) == (0.0, 0.0)


def test_losses_along_an_axis_that_repeats_them_count_once(three: None) -> None:
    assert counts_loss({"data": 1, "pipeline": 1, "copies": 0})
    assert not counts_loss({"data": 0, "pipeline": 0, "copies": 1})
    assert counts_loss({"data": 1})


def test_a_pipeline_waits_where_it_does_not_compute() -> None:
    times = RankTimes(np.zeros(4), np.full(4, 10.0), np.array([8.0, 6.0, 4.0, 4.0]), np.zeros(4))
    axis = PipelineAxis()
    assert axis.wait_seconds(times, [[0, 1], [2, 3]]) == pytest.approx((3 + 6) / 2)
    assert axis.wait_seconds(times, [[0], [1], [2], [3]]) == 0.0


def test_an_error_lists_some_of_the_legal_layouts() -> None:
    with pytest.raises(
        LayoutError, match=r"parallel.data = 3 × parallel.pipeline = 1 needs 3 ranks"
    ):
        mesh_sizes(ParallelSettings(data=3), 4, MODEL, 12)
    with pytest.raises(LayoutError, match=r"and \d+ more"):
        mesh_sizes(ParallelSettings(data=3), 5040, MODEL.replace(layers=5040), 5040)
    with pytest.raises(LayoutError, match="no layout of 7 ranks shares a batch of 8 sequences"):
        mesh_sizes(ParallelSettings(), 7, MODEL, 8)
