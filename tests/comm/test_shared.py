"""The all-reduce in shared memory, beside the plain sum."""

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.comm.mesh import on_one_node
from mpillm.comm.shared import PIECE_BYTES, SharedRows


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("count", [1, 3, 1000, PIECE_BYTES + 77])
def test_every_row_is_the_sum(comm: MPI.Intracomm, count: int, dtype: str) -> None:
    if not on_one_node(comm):
        pytest.skip("the ranks share no memory")
    shared = SharedRows.share(comm, count, np.dtype(dtype))
    assert shared is not None
    assert not shared.own.any()
    for turn in range(3):
        chances = [np.random.default_rng((turn, rank)) for rank in range(comm.size)]
        rows = [(chance.standard_normal(count) * 100).astype(dtype) for chance in chances]
        shared.own[:] = rows[comm.rank]
        shared.allreduce()
        expected = rows[0].copy()
        for row in rows[1:]:
            expected += row
        assert np.array_equal(shared.own, expected)
    shared.free()


def test_a_node_without_room_is_told_to_all(comm: MPI.Intracomm) -> None:
    """16 TiB a rank are more than any node has."""
    assert SharedRows.share(comm, 1 << 42, np.dtype(np.float32)) is None
