"""Rabenseifner's algorithm: reduce-scatter by halving, then spread or gather: the fewest bytes in
about 2 log2(p) rounds (Rabenseifner, "Optimization of collective reduction operations", ICCS 2004).
"""

from mpillm.comm.algorithms.schedule import Algorithm, Round
from mpillm.comm.algorithms.trees import gathering, halving, scattered_owners, spreading


def allreduce(rank: int, size: int, root: int) -> list[Round]:
    """Sum each block on its owner, then spread it from there to all."""
    owners = scattered_owners(size)
    return halving(rank, size, owners) + spreading(rank, size, owners)


def reduce(rank: int, size: int, root: int) -> list[Round]:
    """Sum each block on its owner, then gather them on `root`."""
    owners = scattered_owners(size)
    return halving(rank, size, owners) + gathering(rank, size, owners, root)


RABENSEIFNER = Algorithm({"allreduce": allreduce, "reduce": reduce}, fixed_order=True)
