"""What a collective algorithm is made of: transfers, gathered in rounds, one schedule for each
rank.

The k-th round of one rank exchanges messages with the k-th rounds of others only, and nothing in a
round waits for a later one. So no algorithm of this form can deadlock.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

REDUCING = ("allreduce", "reduce_scatter", "reduce")
"""The operations that reduce."""
Arrival = Literal["add", "copy"]
Move = tuple[int, int, int]
"""(block, sending rank, receiving rank): a transfer independent of any one rank's view."""


@dataclass(frozen=True)
class Transfer:
    """One transfer as one rank sees it, of `width` adjacent blocks from `block` on."""

    peer: int
    block: int
    action: Literal["send", "add", "copy"]
    """"add": receive and combine into the own blocks (sum, max or min); "copy": receive over them.
    """
    width: int = 1
    added: bool = False
    """Whether the receiver adds it; both ends know, because both cut it into the same pieces."""


Round = tuple[Transfer, ...]
"""All are posted at once, then all completed. A send carries the block as the earlier rounds left
it.

Transfers to one peer, and those from one peer, are in rising order of blocks, the same at both
ends. Those from one peer are all added or all copied.
"""
Rounds = Callable[[int, int, int], list[Round]]
"""rounds(rank, size, root): the rounds of `rank` of `size`; only reduce and broadcast have a root.
"""


@dataclass(frozen=True)
class CollectiveSchedule:
    """The rounds of one rank."""

    blocks: int
    """The array is cut into this many blocks by block_bounds(count, blocks)."""
    rounds: tuple[Round, ...]

    @cached_property
    def widest(self) -> int:
        """The most blocks that one message carries."""
        return max(
            (transfer.width for transfers in self.rounds for transfer in transfers), default=0
        )

    @cached_property
    def most_added(self) -> int:
        """The most blocks that arrive in one round to be added."""
        return max(
            (sum(t.width for t in transfers if t.action == "add") for transfers in self.rounds),
            default=0,
        )

    @cached_property
    def sums_over_sent(self) -> bool:
        """Whether some round adds into blocks that it also sends."""
        return any(map(sums_over_sent, self.rounds))

    def longest(self, count: int) -> int:
        """Return the length of the longest block of an array of `count` elements."""
        return -(-count // self.blocks)

    def sent_elements(self, count: int) -> int:
        """Count the elements that the rank sends for an array of `count`, exactly."""
        bounds = block_bounds(count, self.blocks)
        sends = (t for transfers in self.rounds for t in transfers if t.action == "send")
        return sum(bounds[t.block + t.width] - bounds[t.block] for t in sends)


@dataclass(frozen=True)
class Algorithm:
    """One collective algorithm: the rounds of each operation that it can run. A plug-in is such an
    object.

    After its rounds
    - allreduce: every block is the sum on every rank.
    - reduce_scatter: block `rank` is the sum on each rank; the others are left with partial sums.
    - allgather: every block is right; before, block `rank` is right on each rank.
    - broadcast: every block is as `root` had it.
    - reduce: every block is the sum on `root`, partial sums elsewhere.
    - alltoall: from a source to a target array of p equal blocks each, block i of rank j's target
      is block j of rank i's source. The own block is the caller's to copy.
    """

    rounds: Mapping[str, Rounds]
    """Operation → its rounds."""
    whole: frozenset[str] = frozenset()
    """The operations that work on the array as one block; all others cut it into one block a rank.
    """
    fixed_order: bool = False
    """Whether sums are taken in the canonical order of trees.py, bitwise alike at any count."""

    def schedule(self, operation: str, rank: int, size: int, root: int = 0) -> CollectiveSchedule:
        """Return the schedule of `rank` of `size`; raises KeyError for an operation it lacks."""
        # One block keeps whole arrays in one message; p blocks are the units of scattered work.
        rounds = self.rounds[operation](rank, size, root)
        return CollectiveSchedule(1 if operation in self.whole else size, tuple(rounds))


def block_bounds(count: int, size: int) -> list[int]:
    """Return the `size` + 1 bounds that cut `count` elements into blocks of lengths that differ by
    at most 1.
    """
    # In team.c and module.c, too: the kernel cuts blocks by the same formula.
    return [count * block // size for block in range(size + 1)]


def sums_over_sent(transfers: Round) -> bool:
    """Return whether blocks are sent and, in place, summed into in one round."""
    sent = [t for t in transfers if t.action == "send"]
    summed = [t for t in transfers if t.action == "add"]
    # Such a round must receive all pieces before it sums: see executors/blockwise.py.
    return any(
        s.block < t.block + t.width and t.block < s.block + s.width for s in sent for t in summed
    )


def cut(first: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut elements `first` to `stop` into pieces (first, stop) of at most `longest`; an empty range
    has none.
    """
    return ((start, min(start + longest, stop)) for start in range(first, stop, longest))


def one_round(rank: int, moves: Iterable[Move], arrival: Arrival) -> Round:
    """Gather the moves of `rank` into one round; adjacent blocks of one peer become one transfer.

    A move from a rank to itself needs no transfer.
    """
    own: list[Transfer] = []
    for block, sender, receiver in moves:
        if rank == sender != receiver:
            own.append(Transfer(receiver, block, "send", added=arrival == "add"))
        elif rank == receiver != sender:
            own.append(Transfer(sender, block, arrival, added=arrival == "add"))
    merged: list[Transfer] = []
    # Both ends sort alike, so that messages between two ranks match in order.
    for transfer in sorted(own, key=lambda t: (t.action, t.peer, t.block)):
        last = merged[-1] if merged else None
        if (
            last
            and (last.action, last.peer) == (transfer.action, transfer.peer)
            and last.block + last.width == transfer.block
        ):
            merged[-1] = replace(last, width=last.width + 1)
        else:
            merged.append(transfer)
    return tuple(merged)
