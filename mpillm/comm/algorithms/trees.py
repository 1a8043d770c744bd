"""The canonical tree, and the rounds that sum in its order, for any number of ranks.

sum(lo, hi) = sum(lo, mid) + sum(mid, hi), with mid = tree_split(lo, hi): for 6 ranks
((0+1)+(2+3))+(4+5). Addition commutes bit for bit, so only this association matters. Algorithms
differ in which rank takes which sum, and all give the same bits.

Recursive halving and doubling: Thakur, Rabenseifner, Gropp, "Optimization of collective
communication operations in MPICH", International Journal of High Performance Computing Applications
19 (2005). They fold the ranks beyond a power of two into their neighbours, which breaks the order
above. Here the tree itself is uneven instead, and the halving sends no byte more for it. They halve
at distance p/2 first, and the order asks for distance 1 first. So an algorithm that is free to
choose the blocks' owners uses `scattered_owners`: then the blocks from one rank to another are
still adjacent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from mpillm.comm.algorithms.schedule import Move, Round, one_round


def tree_split(lo: int, hi: int) -> int:
    """Return the first rank of the right child of the node of ranks `lo` to `hi` − 1, at least two
    ranks.

    It is `lo` + the largest power of two below the node's size.
    """
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def levels(size: int) -> int:
    """Return the number of levels of inner nodes over `size` leaves."""
    return (size - 1).bit_length()


def scattered_owners(size: int) -> list[int]:
    """Order ranks by their reversed bits: ranks that agree in their lowest bits are adjacent."""
    width = levels(size)
    return sorted(range(size), key=lambda rank: int(f"{rank:0{width}b}"[::-1], 2))


def host(lo: int, hi: int, owner: int) -> int:
    """Return the rank that sums node (lo, hi) of a block that ends on rank `owner`.

    It is the host of one of the node's children: `owner` itself where the node holds it, else the
    rank that agrees with it in the bits that distinguish the node's ranks. If the node ends before
    that rank, the left child, which is never short, has one that agrees in one bit less.
    """
    # Ranks of a node differ in their lowest levels(hi − lo) bits only.
    reach = 1 << levels(hi - lo)
    place = lo + owner % reach
    return place if place < hi else lo + owner % (reach // 2)


def nodes_of(rank: int, size: int) -> Iterator[tuple[int, int, int] | None]:
    """Yield the inner nodes (lo, mid, hi) over `rank`, bottom up, one a level; None for a level
    without.
    """
    for level in range(levels(size)):
        # The tree is aligned: the node of a level begins where the lower bits of the rank are 0.
        half = 1 << level
        lo = rank & -(2 * half)
        yield (lo, lo + half, min(lo + 2 * half, size)) if lo + half < size else None


def halving(rank: int, size: int, owners: Sequence[int]) -> list[Round]:
    """Sum each block up the tree to `owners[block]`. A single block makes a binomial tree."""
    return [one_round(rank, _halving_moves(node, owners), "add") for node in nodes_of(rank, size)]


def _halving_moves(node: tuple[int, int, int] | None, owners: Sequence[int]) -> Iterator[Move]:
    if node is None:
        return
    lo, mid, hi = node
    for block, owner in enumerate(owners):
        left, right, kept = host(lo, mid, owner), host(mid, hi, owner), host(lo, hi, owner)
        # The host that does not keep the sum sends its part to the one that does.
        yield block, left + right - kept, kept


def spreading(rank: int, size: int, owners: Sequence[int]) -> list[Round]:
    """Reverse `halving`: each block goes from its owner down the tree to all."""
    # A rank that received a sum now sends it, and the other way round.
    turned: dict[str, Literal["send", "copy"]] = {"send": "copy", "add": "send"}
    rounds = [
        [replace(t, action=turned[t.action], added=False) for t in up]
        for up in reversed(halving(rank, size, owners))
    ]
    return [tuple(sorted(down, key=lambda t: t.action)) for down in rounds]


def gathering(rank: int, size: int, owners: Sequence[int], root: int) -> list[Round]:
    """Gather each block from its owner to `root`.

    Blocks whose owners agree in their lowest k bits are on one rank k rounds from the end: on
    `root` if it agrees with them, else on the lowest of them.
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
    """Sum one block so that it ends on all ranks.

    In each node as many pairs exchange and add as the right child has sums; at a power of two these
    are all ranks. Elsewhere the ranks that have the whole pass it to the others, twice as many each
    round.
    """
    rounds = []
    for node in nodes_of(rank, size):
        # A left child is never smaller than the right one: its last ranks find no partner here.
        pairs = (
            zip(range(node[0], node[1]), _knowing(node[1], node[2]), strict=False) if node else ()
        )
        rounds.append(
            one_round(rank, [(0, *way) for a, b in pairs for way in ((a, b), (b, a))], "add")
        )
    # Ranks without the whole: only where p is not a power of two.
    have = _knowing(0, size)
    lack = sorted(set(range(size)) - set(have))
    while lack:
        passed = list(zip(have, lack, strict=False))
        rounds.append(one_round(rank, [(0, a, b) for a, b in passed], "copy"))
        have, lack = have + lack[: len(passed)], lack[len(passed) :]
    return rounds


def _knowing(lo: int, hi: int) -> list[int]:
    """List the ranks that hold the sum of node (lo, hi) once its pairs have exchanged."""
    if (hi - lo).bit_count() == 1:
        return list(range(lo, hi))
    # As many pairs as the right child has sums; the left child's further ranks are left out.
    right = _knowing(tree_split(lo, hi), hi)
    return [*range(lo, lo + len(right)), *right]
