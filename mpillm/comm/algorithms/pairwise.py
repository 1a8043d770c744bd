"""Pairwise exchange: all-to-all in p−1 rounds, one partner a round each way (Thakur, Rabenseifner,
Gropp 2005).
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round, Transfer


def alltoall(rank: int, size: int, root: int) -> list[Round]:
    """Send to the rank k above and receive from the rank k below, for k = 1, 2 and so on."""
    # At distance k all pairs are disjoint: each link carries one block each way a round.
    turns = (((rank + k) % size, (rank - k) % size) for k in range(1, size))
    return [
        (Transfer(before, before, "copy"), Transfer(after, after, "send"))
        for after, before in turns
    ]


PAIRWISE = Algorithm({"alltoall": alltoall})
