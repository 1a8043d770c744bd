"""Arrays of more elements than one MPI call counts: the same results, call by call.

The limit is lowered, so that small arrays take the way of large ones.
"""

from typing import Any

import numpy as np
import pytest

from mpillm.comm import buffers
from mpillm.comm.communicator import Communicator
from mpillm.errors import CommError

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall")


@pytest.mark.parametrize("limit", [1, 5, 100])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_lower_limit_changes_no_result(
    comm: Any,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    operation: str,
    in_place: bool,
    blocking: bool,
) -> None:
    if operation == "broadcast" and not in_place:
        pytest.skip("a broadcast is in place")
    group, results = Communicator(comm), []
    count = 12 * comm.size + (0 if operation == "alltoall" else 1)
    bounds = [int(bound) for bound in np.cumsum([0, *_lengths(count, comm.size)])]
    own = slice(bounds[comm.rank], bounds[comm.rank + 1])
    for lowered in (False, True):
        if lowered:
            # Blocks of an alltoall are refused above the limit.
            least = 12 if operation == "alltoall" else 0
            monkeypatch.setattr(buffers, "LARGEST_COUNT", max(limit, least))
        whole = np.arange(count, dtype=np.int64) * 3 + 1000 * comm.rank
        source = whole[own].copy() if operation == "allgather" and not in_place else whole
        target = np.zeros(
            own.stop - own.start if operation == "reduce_scatter" else count, np.int64
        )
        given = (source,) if in_place else (source, target)
        prepared = group.prepare(operation, *given, algorithm="mpi")
        if blocking:
            prepared.run()
        else:
            prepared.start()
            prepared.wait()
        result = source if in_place else target
        if in_place and operation == "reduce_scatter":
            result = source[own]
        results.append(result.copy())
    if operation != "reduce" or comm.rank == 0:
        assert results[0].tolist() == results[1].tolist()
    group.free()


def _lengths(count: int, ranks: int) -> list[int]:
    from mpillm.comm.algorithms.schedule import block_bounds

    return np.diff(block_bounds(count, ranks)).tolist()


def test_a_block_that_is_too_long_is_refused_with_the_number(
    comm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "LARGEST_COUNT", 4)
    group = Communicator(comm)
    if comm.size > 1:
        with pytest.raises(CommError, match="elements at most, not 5; send the array in parts"):
            group.alltoall(np.zeros(5 * comm.size), algorithm="mpi")
    group.free()
