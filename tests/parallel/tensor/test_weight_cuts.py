"""Which part of each weight a rank holds, and which heads and tokens."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.models.decoder import DecoderConfig
from mpillm.parallel.tensor.stream_split import choose_split
from mpillm.parallel.tensor.weight_cuts import (
    column_bounds,
    cut_of,
    own_key_value_heads,
)

SPEC = DecoderConfig(width=48, heads=12, kv_heads=4, hidden=100, vocab_size=257)


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_columns_are_cut_once_and_evenly(count: int, size: int) -> None:
    bounds = column_bounds(count, size)
    parts = [stop - first for first, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(parts)) == (0, count, size)
    assert min(parts) >= 0
    assert max(parts) <= math.ceil(count / size) * 9 / 8
    assert all(bound % 64 == 0 for bound in bounds[:-1]) or count < size * 512


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6))
def test_each_query_head_meets_its_key_head(groups: int, each: int, size: int) -> None:
    heads = groups * each * size
    kv_heads = groups
    for rank in range(size):
        own = heads // size
        named = own_key_value_heads(heads, kv_heads, size, rank)
        assert own % len(named) == 0
        for place in range(own):
            head = rank * own + place
            assert named[place // (own // len(named))] == head // (heads // kv_heads)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_each_token_is_in_one_part(rows: int, length: int, size: int) -> None:
    split = choose_split(rows, length, size)
    shapes = [split.shape(rank) for rank in range(size)]
    assert sum(a * b for a, b in shapes) == rows * length
    if rows % size == 0:
        assert shapes == [(rows // size, length)] * size
    else:
        assert {a for a, _ in shapes} == {rows}
        assert max(b for _, b in shapes) - min(b for _, b in shapes) <= 1


@pytest.mark.parametrize(
    ("name", "shape", "start", "end"),
    [
        ("layers.0.attention.query.weight", (48, 48), (16, 0), (32, 48)),
        ("layers.0.attention.query.bias", (48,), (16,), (32,)),
        ("layers.0.attention.output.weight", (48, 48), (0, 16), (48, 32)),
        ("layers.0.feed_forward.down.weight", (48, 100), (0, 33), (48, 66)),
        ("embedding.weight", (257, 48), (85, 0), (171, 48)),
    ],
)
def test_a_rank_of_three_has_its_part(name, shape, start, end) -> None:
    cut = cut_of(SPEC, name, shape, 3, 1)
    assert cut is not None
    assert cut.start == start
    assert cut.last == end[cut.dim]


@pytest.mark.parametrize(
    "name",
    [
        # Three ranks do not divide four heads of keys.
        "layers.0.attention.key.weight",
        "layers.0.attention.output.bias",
        "layers.0.attention_norm.weight",
        "norm.weight",
        "position.weight",
    ],
)
def test_other_weights_are_replicated(name: str) -> None:
    assert cut_of(SPEC, name, (16, 48), 3, 1) is None
