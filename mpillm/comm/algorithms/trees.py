"""The one canonical tree, and the algorithms that sum in its order, for any number of ranks.

sum(lo, hi) = sum(lo, mid) + sum(mid, hi), with mid = tree_split(lo, hi): for 6 ranks ((0+1)+(2+3))+(4+5). Addition
commutes bit for bit, so only this association matters; which rank takes which sum is free, and it is there that
the algorithms differ. They all give the same bits.

Recursive halving and doubling: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations
in MPICH", International Journal of High Performance Computing Applications 19 (2005). They fold the ranks beyond a
power of two into their neighbours, which breaks the order above; here the tree itself is uneven instead, and the
halving sends no byte more for it. Where they halve at distance p/2 first, the order asks for distance 1 first: whoever
may choose the blocks' owners takes `scattered_owners`, so that what one rank sends to another still lies in one piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from mpillm.comm.algorithms.schedule import Move, Round, one_round


def tree_split(lo: int, hi: int) -> int:
    """Where the node of ranks `lo` to `hi` − 1, two at least, parts: `lo` + the largest power of two below its size."""
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def levels(size: int) -> int:
    """The number of levels of inner nodes over `size` leaves."""
    return (size - 1).bit_length()


def scattered_owners(size: int) -> list[int]:
    """Ranks by their reversed bits: those that agree in their lowest bits stand side by side."""
    width = levels(size)
    return sorted(range(size), key=lambda rank: int(f"{rank:0{width}b}"[::-1], 2))


def host(lo: int, hi: int, owner: int) -> int:
    """The rank that sums node (lo, hi) of a block which is to end on rank `owner`: one of its two children's hosts.

    `owner` itself where the node holds it; elsewhere the rank that agrees with it in the bits that tell the node's
    ranks apart. Where the node ends before that rank, the left child, which is never short, has one that does.
    """
    reach = 1 << levels(hi - lo)
    place = lo + owner % reach
    return place if place < hi else lo + owner % (reach // 2)


def nodes_of(rank: int, size: int) -> Iterator[tuple[int, int, int] | None]:
    """The inner nodes (lo, mid, hi) over `rank`, bottom up, one a level; None where the tree has none there."""
    for level in range(levels(size)):
        half = 1 << level
        lo = rank & -(2 * half)
        yield (lo, lo + half, min(lo + 2 * half, size)) if lo + half < size else None


def halving(rank: int, size: int, owners: Sequence[int]) -> list[Round]:
    """Sum each block up the tree; `owners[block]` ends with the whole. One block makes a binomial tree."""
    return [one_round(rank, _halving_moves(node, owners), "add") for node in nodes_of(rank, size)]


def _halving_moves(node: tuple[int, int, int] | None, owners: Sequence[int]) -> Iterator[Move]:
    if node is None:
        return
    lo, mid, hi = node
    for block, owner in enumerate(owners):
        left, right, kept = host(lo, mid, owner), host(mid, hi, owner), host(lo, hi, owner)
        yield block, left + right - kept, kept


def spreading(rank: int, size: int, owners: Sequence[int]) -> list[Round]:
    """`halving` played backwards: each block goes from its owner down the tree to all."""
    turned: dict[str, Literal["send", "copy"]] = {"send": "copy", "add": "send"}
    rounds = [
        [replace(t, action=turned[t.action], added=False) for t in up]
        for up in reversed(halving(rank, size, owners))
    ]
    return [tuple(sorted(down, key=lambda t: t.action)) for down in rounds]


def gathering(rank: int, size: int, owners: Sequence[int], root: int) -> list[Round]:
    """Each block goes from its owner to `root`: those that agree in their lowest k bits meet k rounds from the end.

    Their meeting place is `root` if it agrees with them, else the lowest of them.
    """

    def meeting(owner: int, bits: int) -> int:
        low = owner % (1 << bits)
        return root if root % (1 << bits) == low else low

    return [
        one_round(
            rank,
            ((b, meeting(o, bits + 1), meeting(o, bits)) for b, o in enumerate(owners)),
            "copy",
        )
        for bits in reversed(range(levels(size)))
    ]


def doubling(rank: int, size: int) -> list[Round]:
    """Sum one block so that it ends on all: in each node as many pairs exchange and add as the right child has sums.

    At a power of two these are all ranks. Elsewhere those that have the whole pass it on, twice as many each round.
    """
    rounds = []
    for node in nodes_of(rank, size):
        pairs = (
            zip(range(node[0], node[1]), _knowing(node[1], node[2]), strict=False) if node else ()
        )
        rounds.append(
            one_round(rank, [(0, *way) for a, b in pairs for way in ((a, b), (b, a))], "add")
        )
    have = _knowing(0, size)
    lack = sorted(set(range(size)) - set(have))
    while lack:
        passed = list(zip(have, lack, strict=False))
        rounds.append(one_round(rank, [(0, a, b) for a, b in passed], "copy"))
        have, lack = have + lack[: len(passed)], lack[len(passed) :]
    return rounds


def _knowing(lo: int, hi: int) -> list[int]:
    """The ranks that hold the sum of node (lo, hi) once its pairs have exchanged."""
    if (hi - lo).bit_count() == 1:
        return list(range(lo, hi))
    right = _knowing(tree_split(lo, hi), hi)
    return [*range(lo, lo + len(right)), *right]
