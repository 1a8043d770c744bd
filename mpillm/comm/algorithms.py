"""Collective algorithms as data: for each rank a list of steps, pure and free of MPI.

An array is cut into as many blocks as there are ranks. A step says which block goes to whom, which block
comes from whom, and whether the receiver adds it or copies it. `interpreter.py` runs any such list; the tests
run it symbolically, for 1 to 64 ranks.

The ring is that of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", Journal of Parallel and Distributed Computing 69 (2009): each rank sends 2(p−1)/p of the array,
the least possible.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """One exchange of one rank; None where nothing is sent, or nothing received."""

    send_to: int | None
    send_block: int | None
    receive_from: int | None
    receive_block: int | None
    combine: Literal["add", "copy"]


def block_bounds(count: int, size: int) -> list[int]:
    """`size` + 1 bounds that cut `count` elements into blocks that differ by one element at most."""
    return [count * block // size for block in range(size + 1)]


def ring_reduce_scatter(rank: int, size: int) -> list[Step]:
    """After these p−1 steps this rank's block `rank` is the sum of all ranks; its others are part sums."""
    right, left = (rank + 1) % size, (rank - 1) % size
    return [Step(right, (rank - turn - 1) % size, left, (rank - turn - 2) % size, "add") for turn in range(size - 1)]


def ring_allgather(rank: int, size: int) -> list[Step]:
    """Before: block `rank` is right on this rank. After these p−1 steps every block is right on every rank."""
    right, left = (rank + 1) % size, (rank - 1) % size
    return [Step(right, (rank - turn) % size, left, (rank - turn - 1) % size, "copy") for turn in range(size - 1)]


def ring_allreduce(rank: int, size: int) -> list[Step]:
    """The sum of all ranks in every block on every rank, bitwise the same on each."""
    return ring_reduce_scatter(rank, size) + ring_allgather(rank, size)
