"""Ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
Journal of Parallel and Distributed Computing 69 (2009).

Each rank sends 2(p−1)/p of the array in an all-reduce, the fewest possible, in 2(p−1) rounds: good
for large arrays, but its latency grows with the ranks.
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round, Transfer


def reduce_scatter(rank: int, size: int, root: int) -> list[Round]:
    """Pass partial sums around the ring; the last to arrive at a rank completes its own block."""
    right, left = (rank + 1) % size, (rank - 1) % size
    # The order of sums starts from another rank for each block, so no fixed order is kept.
    return [
        (
            Transfer(left, (rank - turn - 2) % size, "add", added=True),
            Transfer(right, (rank - turn - 1) % size, "send", added=True),
        )
        for turn in range(size - 1)
    ]


def gather_from(rank: int, size: int, root: int) -> list[Round]:
    """Pass blocks around the ring; rank `root` + i begins with block i."""
    right, left, own = (rank + 1) % size, (rank - 1) % size, rank - root
    return [
        (
            Transfer(left, (own - turn - 1) % size, "copy"),
            Transfer(right, (own - turn) % size, "send"),
        )
        for turn in range(size - 1)
    ]


def allgather(rank: int, size: int, root: int) -> list[Round]:
    """Gather all blocks around the ring: rank i begins with block i."""
    return gather_from(rank, size, 0)


def allreduce(rank: int, size: int, root: int) -> list[Round]:
    """Reduce-scatter, then all-gather."""
    return reduce_scatter(rank, size, 0) + gather_from(rank, size, 0)


RING = Algorithm({"allreduce": allreduce, "reduce_scatter": reduce_scatter, "allgather": allgather})
