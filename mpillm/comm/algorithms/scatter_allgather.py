"""Broadcast of large arrays by a binomial scatter and a ring all-gather: Barnett, Gupta, Payne,
Shuler, van de Geijn, Watts, "Interprocessor collective communication library (InterCom)", Scalable
High Performance Computing Conference (1994).
"""

from mpillm.comm.algorithms.ring import gather_from
from mpillm.comm.algorithms.schedule import Algorithm, Round, one_round
from mpillm.comm.algorithms.trees import levels


def scatter(rank: int, size: int, root: int) -> list[Round]:
    """Bring block i to rank `root` + i, by way of the ranks that lack some of i's lowest bits."""

    # The block passes the ranks whose numbers share its highest bits, one bit more a round.
    def place(block: int, bits: int) -> int:
        return ((block >> bits << bits) + root) % size

    return [
        one_round(rank, ((b, place(b, bits + 1), place(b, bits)) for b in range(size)), "copy")
        for bits in reversed(range(levels(size)))
    ]


def broadcast(rank: int, size: int, root: int) -> list[Round]:
    """Scatter the blocks of `root`, then all-gather them around the ring."""
    return scatter(rank, size, root) + gather_from(rank, size, root)


SCATTER_ALLGATHER = Algorithm({"broadcast": broadcast})
