"""Binomial tree: the whole array up or down the canonical tree of trees.py, in about log2(p) rounds
each way.
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round
from mpillm.comm.algorithms.trees import halving, spreading


def reduce(rank: int, size: int, root: int) -> list[Round]:
    """Sum the array up the tree to `root`."""
    # A single owner: all partial sums of the one block go towards it.
    return halving(rank, size, [root])


def broadcast(rank: int, size: int, root: int) -> list[Round]:
    """Pass the array down the tree from `root`."""
    return spreading(rank, size, [root])


def allreduce(rank: int, size: int, root: int) -> list[Round]:
    """Reduce to rank 0, then broadcast from it."""
    return halving(rank, size, [0]) + spreading(rank, size, [0])


BINOMIAL = Algorithm(
    {"allreduce": allreduce, "broadcast": broadcast, "reduce": reduce},
    whole=frozenset({"allreduce", "broadcast", "reduce"}),
    fixed_order=True,
)
