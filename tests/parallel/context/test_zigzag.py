"""Which positions ranks hold: each position once, in the chunks r and 2p − 1 − r."""

import numpy as np
import pytest

from mpillm.parallel.context.zigzag import longest_length, own_length, own_positions, own_spans


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("length", [0, 1, 5, 128, 1000])
def test_each_position_is_held_once(ranks, length):
    held = [own_positions(rank, ranks, length) for rank in range(ranks)]
    assert sorted(np.concatenate(held).tolist()) == list(range(length))
    assert all((np.diff(own) > 0).all() for own in held)
    counts = [own_length(rank, ranks, length) for rank in range(ranks)]
    assert counts == [len(own) for own in held]
    assert max(counts) == longest_length(ranks, length) <= 2 * -(-length // (2 * ranks))
    assert max(counts) - min(counts) <= 2


def test_chunks_are_those_of_zigzag_order():
    assert [own_spans(rank, 2, 8) for rank in range(2)] == [((0, 2), (6, 8)), ((2, 4), (4, 6))]
    assert own_positions(0, 3, 6).tolist() == [0, 5]
