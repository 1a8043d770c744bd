"""Algorithms proven without MPI: each step list is run symbolically, for 1 to 64 ranks."""

from collections import Counter
from itertools import pairwise

import pytest

from mpillm.comm.algorithms import block_bounds, ring_allgather, ring_allreduce, ring_reduce_scatter

SIZES = [*range(1, 18), 31, 32, 33, 48, 63, 64]


def execute(algorithm, size, blocks):
    """Run every rank's list in lock-step on `blocks[rank][block]`, Counters of whose contributions are in it."""
    lists = [algorithm(rank, size) for rank in range(size)]
    assert len({len(steps) for steps in lists}) == 1
    for turn in range(len(lists[0])):
        on_the_way = {}
        for rank in range(size):
            step = lists[rank][turn]
            if step.send_to is not None:
                on_the_way[rank, step.send_to] = (step.send_block, Counter(blocks[rank][step.send_block]))
        for rank in range(size):
            step = lists[rank][turn]
            if step.receive_from is not None:
                block, content = on_the_way.pop((step.receive_from, rank))
                assert block == step.receive_block  # both ends speak of the same block
                blocks[rank][block] = content + blocks[rank][block] if step.combine == "add" else content
        assert not on_the_way
    return blocks


def own(size):
    return [[Counter({rank: 1}) for _ in range(size)] for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_allreduce_adds_each_rank_once(size):
    whole = Counter(range(size))
    assert execute(ring_allreduce, size, own(size)) == [[whole] * size] * size


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_leaves_the_own_block(size):
    blocks = execute(ring_reduce_scatter, size, own(size))
    assert all(blocks[rank][rank] == Counter(range(size)) for rank in range(size))


@pytest.mark.parametrize("size", SIZES)
def test_allgather_spreads_the_own_block(size):
    blocks = [[Counter({block: int(block == rank)}) for block in range(size)] for rank in range(size)]
    assert execute(ring_allgather, size, blocks) == [[Counter([block]) for block in range(size)]] * size


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_the_least_possible(size):
    bounds = block_bounds(3 * size, size)
    for rank in range(size):
        sent = sum(bounds[s.send_block + 1] - bounds[s.send_block] for s in ring_allreduce(rank, size))
        assert sent * size == 2 * (size - 1) * 3 * size


@pytest.mark.parametrize("count", [0, 1, 5, 64, 2**31 + 5])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_bounds(count, size):
    bounds = block_bounds(count, size)
    lengths = [stop - first for first, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(bounds)) == (0, count, size + 1)
    assert max(lengths) - min(lengths) <= 1
