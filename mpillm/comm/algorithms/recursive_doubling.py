"""Recursive doubling: whole arrays or growing blocks between ranks at distance 1, 2, 4, …: about
log2(p) rounds.

All-reduce: Thakur, Rabenseifner, Gropp 2005 (see trees.py). All-gather where p is not a power of
two: Bruck, Ho, Kipnis, Upfal, Weathersby, "Efficient algorithms for all-to-all communications in
multiport message-passing systems", IEEE Transactions on Parallel and Distributed Systems 8 (1997).
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round, one_round
from mpillm.comm.algorithms.trees import doubling, levels


def allreduce(rank: int, size: int, root: int) -> list[Round]:
    """Exchange and add whole arrays, for small ones."""
    return doubling(rank, size)


def allgather(rank: int, size: int, root: int) -> list[Round]:
    """Exchange all blocks that a pair of ranks has, at distance 1, 2, 4 and so on.

    Where p is not a power of two, each rank passes them to the rank `distance` below it instead
    (Bruck).
    """
    rounds = []
    for distance in (1 << level for level in range(levels(size))):
        # A pair at this distance exists for every rank only at a power of two.
        if size.bit_count() == 1:
            ways = [(rank, rank ^ distance), (rank ^ distance, rank)]
            moves = [((a & -distance) + i, a, b) for a, b in ways for i in range(distance)]
        else:
            ways = [(rank, (rank - distance) % size), ((rank + distance) % size, rank)]
            moves = [
                ((a + i) % size, a, b)
                for a, b in ways
                for i in range(min(distance, size - distance))
            ]
        rounds.append(one_round(rank, moves, "copy"))
    return rounds


RECURSIVE_DOUBLING = Algorithm(
    {"allreduce": allreduce, "allgather": allgather},
    whole=frozenset({"allreduce"}),
    fixed_order=True,
)
