"""The interpreter: any list of steps, cut in segments, at any number of ranks."""

import numpy as np
import pytest

from mpillm.comm.algorithms import Step, block_bounds, ring_allreduce
from mpillm.comm.buffers import as_buffer
from mpillm.comm.interpreter import cut, run


def test_cut():
    assert cut([0, 5, 12], 1, 3) == [(5, 8), (8, 11), (11, 12)]
    assert cut([0, 5, 5], 1, 3) == []
    assert cut([0, 5], None, 3) == []


@pytest.mark.parametrize("segment_bytes", [1, 8, 24, 40, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 23, 100])
def test_segments(comm, segment_bytes, count):
    array = (np.arange(count) + 1.0) * (comm.rank + 1)
    steps = ring_allreduce(comm.rank, comm.size)
    run(steps, comm, as_buffer(array), block_bounds(count, comm.size), segment_bytes)
    np.testing.assert_array_equal(array, (np.arange(count) + 1.0) * sum(range(1, comm.size + 1)))


def test_one_sided_steps(comm):
    """A chain: each rank but the first receives, each but the last sends, and nobody else moves."""
    before = comm.rank - 1 if comm.rank else None
    after = comm.rank + 1 if comm.rank + 1 < comm.size else None
    receive = Step(None, None, before, None if before is None else 0, "copy")
    send = Step(after, None if after is None else 0, None, None, "copy")
    array = np.full(1000, comm.rank, np.int32)
    run([receive, send], comm, as_buffer(array), [0, 1000], 256)
    assert (array == 0).all()


def test_a_slow_rank_locks_nobody(comm):
    """Blocks of many segments with one rank always late: the others' posts must not overrun or lock."""
    count = 64 * comm.size
    array = np.ones(count, np.float32)
    for _ in range(5):
        if comm.rank == comm.size - 1:
            sum(range(200_000))
        run(ring_allreduce(comm.rank, comm.size), comm, as_buffer(array), block_bounds(count, comm.size), 16)
    assert (array == comm.size**5).all()
