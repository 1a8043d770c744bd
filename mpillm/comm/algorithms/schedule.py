"""What a collective algorithm is made of: transfers, gathered in rounds, one schedule for each rank.

The k-th round of one rank meets only the k-th rounds of others, and nothing in a round waits for a later one; so
no circle of waiting can form, whatever the algorithm.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Arrival = Literal["add", "copy"]
Move = tuple[int, int, int]
"""(block, sending rank, receiving rank): a transfer as seen from outside."""


@dataclass(frozen=True)
class Transfer:
    """One transfer as one rank sees it, of `width` adjacent blocks from `block` on."""

    peer: int
    block: int
    action: Literal["send", "add", "copy"]
    """"add": receive and combine into the own blocks (sum, max or min); "copy": receive over them."""
    width: int = 1
    added: bool = False
    """Whether it is added where it arrives; both ends say so, and cut it alike."""


Round = tuple[Transfer, ...]
"""All are posted at once, then all completed. A send carries the block as the earlier rounds left it.

Transfers to one peer, and those from one peer, stand in rising order of blocks, the same at both ends; those from one
peer are all added or all copied.
"""


@dataclass(frozen=True)
class CollectiveSchedule:
    """What one rank does."""

    blocks: int
    """The array is cut into so many blocks by block_bounds(count, blocks)."""
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
        """Whether some round does."""
        return any(map(sums_over_sent, self.rounds))

    def longest(self, count: int) -> int:
        """The most elements that a block has where the array has `count`."""
        return -(-count // self.blocks)


def block_bounds(count: int, size: int) -> list[int]:
    """`size` + 1 bounds that cut `count` elements into blocks that differ by one element at most."""
    return [count * block // size for block in range(size + 1)]


def sums_over_sent(transfers: Round) -> bool:
    """Whether blocks are sent and, in place, summed into in one round."""
    sent = [t for t in transfers if t.action == "send"]
    summed = [t for t in transfers if t.action == "add"]
    return any(
        s.block < t.block + t.width and t.block < s.block + s.width for s in sent for t in summed
    )


def cut(first: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Elements `first` to `stop` in pieces (first, stop) of `longest` at most; an empty range has none."""
    return ((start, min(start + longest, stop)) for start in range(first, stop, longest))


def one_round(rank: int, moves: Iterable[Move], arrival: Arrival) -> Round:
    """The moves that `rank` takes part in, adjacent blocks of one peer put together; one from itself is none."""
    own: list[Transfer] = []
    for block, sender, receiver in moves:
        if rank == sender != receiver:
            own.append(Transfer(receiver, block, "send", added=arrival == "add"))
        elif rank == receiver != sender:
            own.append(Transfer(sender, block, arrival, added=arrival == "add"))
    merged: list[Transfer] = []
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
