"""The exchange moves any number of elements: in one call, or in pieces beyond what MPI counts."""

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.tokens.shuffle import LARGEST_PART, _alltoallv


@pytest.mark.parametrize("limit", [1, 7, 64, LARGEST_PART])
@pytest.mark.parametrize("dtype", ["<u2", "<u8"])
def test_pieces_give_what_one_call_gives(limit: int, dtype: str, comm: MPI.Intracomm) -> None:
    counts = np.random.default_rng(1).integers(0, 40, (comm.size, comm.size))
    counts[0, -1] = 0

    def part(sender: int, receiver: int) -> np.ndarray:
        return (np.arange(counts[sender, receiver]) + 1000 * sender + 100 * receiver).astype(dtype)

    sent = np.concatenate([part(comm.rank, to) for to in range(comm.size)])
    expected = np.concatenate([part(sender, comm.rank) for sender in range(comm.size)])
    found = _alltoallv(sent, counts[comm.rank], comm, limit)
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, expected)
