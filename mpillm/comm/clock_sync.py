"""One clock for all ranks: the offset of each host's time.perf_counter from that of rank 0."""

import time
from typing import TYPE_CHECKING

from mpillm.machine.node_map import NodeMap, map_nodes

if TYPE_CHECKING:
    from mpi4py import MPI

# The offset's error is half the shortest round trip, and 50 of them find a short one even on a busy
# network.
TRIALS = 50
TAG = 7


def clock_offset(comm: "MPI.Intracomm", node_map: NodeMap | None = None) -> float:
    """Return the seconds to subtract from this rank's time.perf_counter to get rank 0's.

    Every rank of `comm` calls it; `node_map`: of `comm`. On Linux the processes of a host share
    this clock. Between hosts the shortest of several round trips gives it (Cristian, "Probabilistic
    clock synchronization", Distributed Computing 3 (1989)); the error is at most half of that trip.
    """
    from mpi4py import MPI

    node_map = node_map or map_nodes(comm)
    leads = node_map.local_rank(comm.rank) == 0
    leaders = comm.Split(0 if leads else MPI.UNDEFINED, comm.rank)
    offset = 0.0
    if leaders != MPI.COMM_NULL:
        offset = _offset_of_leader(leaders)  # type: ignore[arg-type]
        leaders.Free()
    offsets: list[float] = comm.allgather(offset)
    return offsets[node_map.local_ranks(comm.rank)[0]]


def _offset_of_leader(leaders: "MPI.Intracomm") -> float:
    if leaders.rank:
        for _ in range(TRIALS):
            leaders.recv(source=0, tag=TAG)
            leaders.send(time.perf_counter(), 0, TAG)
        return float(leaders.recv(source=0, tag=TAG))
    for other in range(1, leaders.size):
        leaders.send(min(_trial(leaders, other) for _ in range(TRIALS))[1], other, TAG)
    return 0.0


def _trial(leaders: "MPI.Intracomm", other: int) -> tuple[float, float]:
    """Measure one round trip: (its seconds, the other's clock minus this one's in the middle of
    it).
    """
    began = time.perf_counter()
    leaders.send(None, other, TAG)
    theirs = float(leaders.recv(source=other, tag=TAG))
    ended = time.perf_counter()
    return ended - began, theirs - (began + ended) / 2
