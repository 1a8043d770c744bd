"""Shards of weights: pure numbers, for any number of ranks."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mpillm.parallel.data.shard_layout import LINE_ELEMENTS, UNEVEN, ShardLayout

COUNTS = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


@given(COUNTS, st.integers(1, 64), st.data())
def test_the_runs_tile_each_weight(counts, shards, data) -> None:
    kinds = st.sampled_from(["even", "whole", "first"])
    deals = data.draw(st.lists(kinds, min_size=len(counts), max_size=len(counts)))
    layout = ShardLayout(tuple(counts), shards, tuple(deals))
    for weight, count in enumerate(counts):
        runs = [run for stream in layout.streams for run in stream if run.weight == weight]
        covered = sorted((run.first, run.first + run.count) for run in runs)
        assert [first for first, _ in covered] == [0, *(end for _, end in covered[:-1])]
        assert covered[-1][1] == count
        assert len(runs) <= shards if deals[weight] == "even" else len(runs) == 1
        if deals[weight] == "first":
            assert runs[0] in layout.streams[0]
    for stream in layout.streams:
        # No two runs share a line, in the stream and in the weight.
        assert all(run.offset % LINE_ELEMENTS == run.first % LINE_ELEMENTS == 0 for run in stream)
        for run, after in pairwise(stream):
            assert run.offset + run.count <= after.offset
        assert not stream or stream[-1].offset + stream[-1].count <= layout.length


@given(COUNTS, st.integers(1, 16), st.integers(1, 20_000))
def test_units_cut_the_streams_without_a_gap(counts, shards, elements) -> None:
    layout = ShardLayout(tuple(counts), shards, ("even",) * len(counts))
    units = layout.units(elements)
    assert [unit.first for unit in units] == [0, *(unit.last for unit in units[:-1])]
    assert units[-1].last == layout.length
    for shard, stream in enumerate(layout.streams):
        found = [(run.weight, run.first, run.count) for unit in units for run in unit.runs[shard]]
        # Pieces of one run follow each other.
        merged: list[list[int]] = []
        for weight, first, count in found:
            if merged and merged[-1][0] == weight and sum(merged[-1][1:]) == first:
                merged[-1][2] += count
            else:
                merged.append([weight, first, count])
        assert merged == [[run.weight, run.first, run.count] for run in stream]
    for unit in units:
        assert all(
            run.offset + run.count <= unit.last - unit.first for runs in unit.runs for run in runs
        )


@given(COUNTS, st.integers(1, 16), st.integers(0, 20_000), st.data())
def test_units_of_some_weights_hold_their_runs_alone(counts, shards, elements, data) -> None:
    layout = ShardLayout(tuple(counts), shards, ("even",) * len(counts))
    chosen = data.draw(st.sets(st.integers(0, len(counts) - 1), min_size=1))
    units = layout.units_of(chosen, elements)
    assert elements or len(units) == 1
    assert {number for unit in units for number in unit.weights} == chosen
    for shard, stream in enumerate(layout.streams):
        wanted = {run.weight: run.count for run in stream if run.weight in chosen}
        found = dict.fromkeys(wanted, 0)
        end = 0
        for unit in units:
            for run in unit.runs[shard]:
                # In a row, without an overlap, within the unit.
                assert unit.first + run.offset >= end
                end = unit.first + run.offset + run.count
                assert end <= unit.last
                found[run.weight] += run.count
        assert found == wanted


def test_even_cuts_differ_by_a_line_a_weight() -> None:
    layout = ShardLayout((100_000, 33, 5), 4, ("even",) * 3)
    sums = [sum(run.count for run in stream) for stream in layout.streams]
    assert max(sums) - min(sums) <= 3 * LINE_ELEMENTS * 4


def test_whole_weights_are_dealt_out_evenly() -> None:
    layer = (590_000, 1_570_000, 1_570_000, 1_570_000, 590_000, 590_000, 590_000)
    layout = ShardLayout(layer * 8, 4, ("whole",) * 56)
    sums = [sum(run.count for run in stream) for stream in layout.streams]
    assert max(sums) * 4 <= UNEVEN * sum(sums)
