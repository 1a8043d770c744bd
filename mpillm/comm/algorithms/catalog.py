"""Collective algorithms as data: for each rank a list of rounds of transfers, pure and free of MPI.

`interpreter.py` and `lockstep.py` run any such list; the tests run it symbolically, for 1 to 64 ranks; `total_sent`
prices it.

- ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of
  Parallel and Distributed Computing 69 (2009). Each rank sends 2(p−1)/p of the array, the least possible, in
  2(p−1) rounds.
- recursive-doubling, recursive-halving, rabenseifner, binomial: see `trees.py`. About log2(p) rounds.
- scatter-allgather: Barnett, Gupta, Payne, Shuler, van de Geijn, Watts, "Interprocessor collective communication
  library (InterCom)", Scalable High Performance Computing Conference (1994).
- pairwise: all-to-all in p−1 rounds, one partner a round each way (Thakur, Rabenseifner, Gropp 2005).
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

from mpillm.comm.algorithms.schedule import (
    CollectiveSchedule,
    Round,
    Transfer,
    block_bounds,
    one_round,
)
from mpillm.comm.algorithms.trees import (
    doubling,
    gathering,
    halving,
    levels,
    scattered_owners,
    spreading,
    tree_split,
)
from mpillm.errors import CommError

__all__ = [
    "ALGORITHMS",
    "FIXED_ORDER",
    "CollectiveSchedule",
    "Round",
    "Transfer",
    "block_bounds",
    "schedule",
    "sent_elements",
    "total_sent",
    "tree_split",
]

FIXED_ORDER: frozenset[str] = frozenset(
    {"recursive-doubling", "rabenseifner", "recursive-halving", "binomial"}
)
"""The algorithms whose sums are taken in the canonical order of `trees.py`, bitwise alike at any count."""


@lru_cache(maxsize=4096)
def schedule(
    operation: str, algorithm: str, rank: int, size: int, root: int = 0
) -> CollectiveSchedule:
    """What `rank` of `size` does in `operation` by `algorithm`; see ALGORITHMS. `root`: of reduce and broadcast.

    - allreduce: every block is the sum on every rank.
    - reduce_scatter: block `rank` is the sum on each rank; the others are left with part sums.
    - allgather: before, block `rank` is right on each rank; after, every block is.
    - broadcast: every block is as `root` had it. reduce: every block is the sum on `root`, part sums elsewhere.
    - alltoall: from a source to a target array of p equal blocks each: block i of rank j's target is block j of rank
      i's source. The own block is the caller's to copy.

    Raises CommError for an unknown operation or algorithm.
    """
    if algorithm not in _LISTS.get(operation, {}):
        known = ", ".join(f"{name} by {' or '.join(lists)}" for name, lists in ALGORITHMS.items())
        raise CommError(f"no list is known for {operation} by {algorithm}; take {known}")
    rounds = _LISTS[operation][algorithm](rank, size, root)
    whole = algorithm == "binomial" or (
        operation == "allreduce" and algorithm == "recursive-doubling"
    )
    return CollectiveSchedule(1 if whole else size, tuple(rounds))


def sent_elements(
    operation: str, algorithm: str, rank: int, size: int, count: int, root: int = 0
) -> int:
    """The elements that `rank` sends for an array of `count`, exactly."""
    plan = schedule(operation, algorithm, rank, size, root)
    bounds = block_bounds(count, plan.blocks)
    sends = (t for transfers in plan.rounds for t in transfers if t.action == "send")
    return sum(bounds[t.block + t.width] - bounds[t.block] for t in sends)


def total_sent(operation: str, algorithm: str, size: int, count: int) -> int:
    """The elements that all ranks together send for an array of `count`, by the literature's formulas; root 0.

    To sum n elements of p ranks, or to spread them, takes (p−1)n at least, and an all-reduce twice that (Patarasuk and
    Yuan 2009); ring, rabenseifner and binomial need no more. Recursive doubling sends n log2(p) a rank at powers of
    two (Thakur, Rabenseifner, Gropp 2005); see `_doubling_sent` for the others. A binomial scatter or gather carries
    a block once for each bit set in the number of its owner: n log2(p)/2 in all at powers of two.
    """
    least = (size - 1) * count
    if operation != "allreduce":
        walks = (operation, algorithm) in (
            ("broadcast", "scatter-allgather"),
            ("reduce", "rabenseifner"),
        )
        return least + (_walked(size, count, algorithm == "rabenseifner") if walks else 0)
    return _doubling_sent(size) * count if algorithm == "recursive-doubling" else 2 * least


def _walked(size: int, count: int, scattered: bool) -> int:
    bounds = block_bounds(count, size)
    owners = scattered_owners(size) if scattered else range(size)
    return sum((bounds[b + 1] - bounds[b]) * owner.bit_count() for b, owner in enumerate(owners))


def _doubling_sent(size: int) -> int:
    """Whole arrays sent in recursive doubling, from the bits of p = 2^a0 + … + 2^am, a0 the lowest.

    Each of the m + 1 even subtrees doubles by itself: ai · 2^ai sends. Their m joins pair 2^a0, 2^(a0+1), … ranks,
    with two sends a pair. That leaves 2^(a0+m) ranks with the sum, and one send for each of the others.
    """
    bits = [bit for bit in range(size.bit_length()) if size >> bit & 1]
    joins = len(bits) - 1
    lowest = 1 << bits[0]
    return (
        sum(bit << bit for bit in bits) + 2 * lowest * ((1 << joins) - 1) + size - (lowest << joins)
    )


def _ring_reduce_scatter(rank: int, size: int, root: int) -> list[Round]:
    right, left = (rank + 1) % size, (rank - 1) % size
    return [
        (
            Transfer(left, (rank - turn - 2) % size, "add", added=True),
            Transfer(right, (rank - turn - 1) % size, "send", added=True),
        )
        for turn in range(size - 1)
    ]


def _ring_allgather(rank: int, size: int, root: int) -> list[Round]:
    """Around the ring; rank `root` + i begins with block i."""
    right, left, own = (rank + 1) % size, (rank - 1) % size, rank - root
    return [
        (
            Transfer(left, (own - turn - 1) % size, "copy"),
            Transfer(right, (own - turn) % size, "send"),
        )
        for turn in range(size - 1)
    ]


def _ring_allreduce(rank: int, size: int, root: int) -> list[Round]:
    return _ring_reduce_scatter(rank, size, 0) + _ring_allgather(rank, size, 0)


def _doubling_allgather(rank: int, size: int, root: int) -> list[Round]:
    """Pairs at distance 1, 2, 4, … exchange all that they have.

    Where p is no power of two, each rank hands on to the rank `distance` below it instead (Bruck and others 1997).
    """
    rounds = []
    for distance in (1 << level for level in range(levels(size))):
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


def _binomial_scatter(rank: int, size: int, root: int) -> list[Round]:
    """Rank `root` + i ends with block i, which walks over the ranks that lack some of i's lowest bits."""

    def place(block: int, bits: int) -> int:
        return ((block >> bits << bits) + root) % size

    return [
        one_round(rank, ((b, place(b, bits + 1), place(b, bits)) for b in range(size)), "copy")
        for bits in reversed(range(levels(size)))
    ]


def _rabenseifner_allreduce(rank: int, size: int, root: int) -> list[Round]:
    owners = scattered_owners(size)
    return halving(rank, size, owners) + spreading(rank, size, owners)


def _rabenseifner_reduce(rank: int, size: int, root: int) -> list[Round]:
    owners = scattered_owners(size)
    return halving(rank, size, owners) + gathering(rank, size, owners, root)


def _pairwise(rank: int, size: int, root: int) -> list[Round]:
    turns = (((rank + k) % size, (rank - k) % size) for k in range(1, size))
    return [
        (Transfer(before, before, "copy"), Transfer(after, after, "send"))
        for after, before in turns
    ]


_List = Callable[[int, int, int], list[Round]]
_LISTS: Mapping[str, Mapping[str, _List]] = MappingProxyType(
    {
        "allreduce": {
            "ring": _ring_allreduce,
            "recursive-doubling": lambda rank, size, root: doubling(rank, size),
            "rabenseifner": _rabenseifner_allreduce,
            "binomial": lambda rank, size, root: (
                halving(rank, size, [0]) + spreading(rank, size, [0])
            ),
        },
        "reduce_scatter": {
            "ring": _ring_reduce_scatter,
            "recursive-halving": lambda rank, size, root: halving(rank, size, range(size)),
        },
        "allgather": {
            "ring": lambda rank, size, root: _ring_allgather(rank, size, 0),
            "recursive-doubling": _doubling_allgather,
        },
        "broadcast": {
            "binomial": lambda rank, size, root: spreading(rank, size, [root]),
            "scatter-allgather": lambda rank, size, root: (
                _binomial_scatter(rank, size, root) + _ring_allgather(rank, size, root)
            ),
        },
        "reduce": {
            "binomial": lambda rank, size, root: halving(rank, size, [root]),
            "rabenseifner": _rabenseifner_reduce,
        },
        "alltoall": {"pairwise": _pairwise},
    }
)

ALGORITHMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(lists) for name, lists in _LISTS.items()}
)
"""Operation → the names of its lists."""
