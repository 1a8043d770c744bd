"""One clock for all ranks: how far each host's time.perf_counter is from that of rank 0."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

TRIALS = 50
TAG = 7


def clock_offset(comm: "MPI.Intracomm") -> float:
    """Seconds to take from this rank's time.perf_counter to have rank 0's. Every rank of `comm` calls it.

    On Linux the processes of a host have one such clock. Between hosts: of several round trips the shortest, in whose
    middle the other clock was read (Cristian, "Probabilistic clock synchronization", Distributed Computing 3 (1989));
    it errs by half of that trip at the most.
    """
    from mpi4py import MPI

    node: MPI.Intracomm = comm.Split_type(MPI.COMM_TYPE_SHARED)  # type: ignore[assignment]
    leaders = comm.Split(0 if node.rank == 0 else MPI.UNDEFINED, comm.rank)
    offset = 0.0
    if leaders != MPI.COMM_NULL:
        offset = _offset_of_leader(leaders)  # type: ignore[arg-type]
        leaders.Free()
    offset = float(node.bcast(offset))
    node.Free()
    return offset


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
    """(seconds of a round trip, the other's clock less this one's in the middle of it)."""
    begun = time.perf_counter()
    leaders.send(None, other, TAG)
    theirs = float(leaders.recv(source=other, tag=TAG))
    ended = time.perf_counter()
    return ended - begun, theirs - (begun + ended) / 2
