"""Which layers each stage holds, and how ranks lie along the axes."""

import itertools
import re

import pytest

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap, nodes_by_first
from mpillm.models.decoder import DecoderConfig
from mpillm.parallel.axis_sizes import legal_layouts, mesh_sizes
from mpillm.parallel.pipeline.partition import even_counts, partition_blocks
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import Precision, make_mesh, traffic_bytes

CONFIG = DecoderConfig(layers=12, width=64, heads=4, context=32, vocab_size=5000)


def model(layers):
    return CONFIG.replace(layers=layers)


def dearest(costs, counts):
    stops = list(itertools.accumulate(counts))
    return max(sum(costs[stop - count : stop]) for count, stop in zip(counts, stops, strict=True))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("behind", [0.0, 1.0, 2.5, 9.0])
def test_no_other_cut_is_cheaper(stages, behind):
    layers, before = [1.0] * 7, 0.5
    counts = even_counts(layers, before, behind, stages)
    assert sum(counts) == 7
    assert min(counts) >= 1
    costs = [1.5, *[1.0] * 5, 1.0 + behind]
    every = [cut for cut in itertools.product(range(1, 8), repeat=stages) if sum(cut) == 7]
    assert dearest(costs, counts) == min(dearest(costs, cut) for cut in every)


def test_the_head_takes_the_place_of_layers():
    parts = partition_blocks(CONFIG, 4)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == 12
    assert parts[-1].last - parts[-1].first < parts[0].last - parts[0].first
    assert partition_blocks(CONFIG, 3, (2, 4, 6))[1].first == 2
    whole = sum(CONFIG.block_flops) + sum(CONFIG.end_flops)
    assert whole == pytest.approx(CONFIG.flops_per_token)


@pytest.mark.parametrize(
    ("stages", "wanted", "words"),
    [
        (13, "auto", "13 stages need a layer each"),
        (2, (6, 5), "shares out 11 layers"),
        (3, (6, 6), "over 2 stages"),
    ],
)
def test_shares_that_do_not_fit(stages, wanted, words):
    with pytest.raises(LayoutError, match=words):
        partition_blocks(CONFIG, stages, wanted)


def test_ranks_dealt_out_in_turns_stand_by_their_hosts():
    assert NodeMap(nodes_by_first([0, 1, 0, 1])).host_order == [0, 2, 1, 3]
    assert NodeMap(nodes_by_first([0, 0, 2, 2])).host_order == [0, 1, 2, 3]


def test_the_busiest_axis_is_innermost(comm):
    sizes = {"data": 2, "pipeline": 2}
    small, large = traffic_bytes(sizes, CONFIG, 2, 1), traffic_bytes(sizes, CONFIG, 4096, 1)
    assert small["data"] > small["pipeline"]
    assert large["data"] < large["pipeline"]
    lower = traffic_bytes(sizes, CONFIG, 2, 1, Precision("cpu", "bfloat16", "float32"))
    assert lower == {"data": small["data"], "pipeline": small["pipeline"] / 2}
    if comm.size == 4:
        settings = ParallelSettings(pipeline=2)
        assert list(make_mesh(comm, settings, CONFIG, 4096).sizes) == ["data", "pipeline"]
        assert list(make_mesh(comm, settings, CONFIG, 2).sizes) == ["pipeline", "data"]


def test_a_pipeline_that_does_not_divide_the_ranks():
    assert mesh_sizes(ParallelSettings(pipeline=3), 6, model(6), 12) == {"data": 2, "pipeline": 3}
    with pytest.raises(
        LayoutError,
        match=r"pipeline = 4 must divide the ranks, and the job has 6.* start with 4 or 8",
    ):
        mesh_sizes(ParallelSettings(pipeline=4), 6, model(6), 12)


def test_the_layouts_that_a_job_can_have():
    assert mesh_sizes(ParallelSettings(data="auto"), 6, model(6), 12) == {"data": 6, "pipeline": 1}
    assert mesh_sizes(ParallelSettings(data=0, pipeline=2), 6, model(6), 12) == {
        "data": 3,
        "pipeline": 2,
    }
    words = (
        "parallel.data = 4 × parallel.pipeline = 1 needs 4 ranks, and the job has 2; "
        "take data=2 × pipeline=1 or data=1 × pipeline=2 "
        '(parallel.data = "auto" takes what the pipeline leaves), or start with 4'
    )
    with pytest.raises(LayoutError, match=re.escape(words)):
        mesh_sizes(ParallelSettings(data=4), 2, model(6), 12)
    with pytest.raises(
        LayoutError, match="a global batch of 9 sequences cannot be shared by 2 ranks; take data=1"
    ):
        mesh_sizes(ParallelSettings(), 2, model(2), 9)
    # A layer a rank at least, and a batch that the data axis divides.
    plain = {"context": 1, "tensor": 1}
    assert [
        layout for layout in legal_layouts(8, model(3), 12) if layout.items() >= plain.items()
    ] == [{"data": 4, "pipeline": 2, **plain}]
    with pytest.raises(
        LayoutError, match="no layout of 5 ranks shares a batch of 12 sequences and 3 layers: take"
    ):
        mesh_sizes(ParallelSettings(data=4), 5, model(3), 12)
