"""Routes of tokens to the owners of their experts: plain numbers, the same on every rank.

Shapes: R ranks, E experts, of which each rank owns E / R neighbours; rows are inputs of experts.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


class Piece(NamedTuple):
    """Rows of one expert that pass between this rank and `peer`."""

    peer: int
    sent: int
    """The place of its first row at the rank that passes it on."""
    received: int
    """Its place at the other end."""
    rows: int


class TokenRoutes:
    """The routes of one mixture's rows, from the counts of all ranks.

    A sender has its rows sorted by expert. An owner has those of all ranks sorted by expert, then
    by sender, so that each of its experts computes one product.
    """

    def __init__(self, counts_RE: Sequence[Sequence[int]] | Counts) -> None:
        """`counts_RE[rank][expert]`: the rows that a rank has for an expert."""
        self._counts: Counts = np.asarray(counts_RE, np.int64)
        self.ranks, experts = self._counts.shape
        self.owned = experts // self.ranks
        """The experts of each owner."""

    @cached_property
    def _at_sender(self) -> Counts:
        """The place of the first row of each expert, by sender: (R, E)."""
        return np.cumsum(self._counts, axis=1) - self._counts

    @cached_property
    def _at_owner(self) -> Counts:
        """The place of the same rows at the expert's owner: (R, E)."""
        # By owner, expert and sender, in the order in which the owner has them.
        by_owner = self._counts.T.reshape(self.ranks, -1)
        places = np.cumsum(by_owner, axis=1) - by_owner
        return np.ascontiguousarray(places.reshape(-1, self.ranks).T)

    @property
    def most_rows(self) -> int:
        """The most rows that a rank sends, or receives as an owner."""
        return int(max(self._counts.sum(1).max(), self.block_rows.sum(0).max()))

    @property
    def block_rows(self) -> Counts:
        """The rows by sender and owner: (R, R)."""
        rows: Counts = self._counts.reshape(self.ranks, self.ranks, self.owned).sum(2)
        return rows

    def counts_of(self, owner: int) -> list[int]:
        """Return the rows of each expert of `owner`."""
        return self._counts.sum(0)[self._own(owner)].tolist()  # type: ignore[no-any-return]

    def by_sender(self, owner: int) -> Counts:
        """Return the rows of each expert of `owner`, by expert and sender: (E / R, R)."""
        return self._counts[:, self._own(owner)].T

    def to_owners(self, sender: int) -> Iterator[Piece]:
        """Yield what `sender` passes to owners."""
        given = self._counts[sender], self._at_sender[sender], self._at_owner[sender]
        for expert, (rows, sent, received) in enumerate(zip(*map(_list, given), strict=True)):
            if rows:
                yield Piece(expert // self.owned, sent, received, rows)

    def to_senders(self, owner: int) -> Iterator[Piece]:
        """Yield what `owner` passes back."""
        for sender in range(self.ranks):
            for piece in self.to_owners(sender):
                if piece.peer == owner:
                    yield Piece(sender, piece.received, piece.sent, piece.rows)

    def _own(self, owner: int) -> slice:
        return slice(owner * self.owned, (owner + 1) * self.owned)


def _list(array: Counts) -> list[Any]:
    return array.tolist()  # type: ignore[no-any-return]
