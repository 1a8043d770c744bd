"""Recursive halving: a reduce-scatter in about log2(p) rounds (Thakur, Rabenseifner, Gropp 2005,
see trees.py).
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round
from mpillm.comm.algorithms.trees import halving


def reduce_scatter(rank: int, size: int, root: int) -> list[Round]:
    """Sum block i up the canonical tree to rank i."""
    return halving(rank, size, range(size))


RECURSIVE_HALVING = Algorithm({"reduce_scatter": reduce_scatter}, fixed_order=True)
