"""Ulysses (Jacobs et al. 2023): ranks exchange positions for heads, attend, and exchange back.

A rank then has all positions of its share of the heads, in the order of the sequence: the model's
own attention computes any pattern, within any documents.

Shapes: B sequences, T positions of a rank, L those of the longest share, S of the whole sequence,
H heads, K heads of keys and values, D width of a head.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.models.layers.attention import Pattern, attend
from mpillm.models.layers.document_spans import DocumentSpans
from mpillm.parallel.context.rank_attention import RankAttention
from mpillm.parallel.context.zigzag import longest_length, own_length, own_positions
from mpillm.parallel.exchanged import exchanged


class HeadExchange(RankAttention):
    """The exchange of one rank."""

    def __init__(
        self,
        axis: Axis,
        *,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """`profile`, `debug`, `warn`: as in Communicator."""
        super().__init__(axis)
        self._comm = Communicator(
            axis.comm, profile=profile, debug=debug, warn=warn, node_map=axis.node_map
        )
        self.moved_bytes = 0
        """Of heads that this rank took from others."""

    def attend_over(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        pattern: Pattern,
        spans: DocumentSpans | None,
        length: int,
    ) -> Tensor:
        there = partial(self.to_heads, length=length)
        back = partial(self.to_positions, length=length)
        q_BSHD, k_BSKD, v_BSKD = (exchanged(x, there, back) for x in (q_BTHD, k_BTKD, v_BTKD))
        # The models' own entry, with the heads of this rank alone.
        return exchanged(attend(q_BSHD, k_BSKD, v_BSKD, pattern, spans), back, there)

    def to_heads(self, x_BTHD: Tensor, length: int) -> Tensor:
        """Give positions of all heads, take all positions of own heads: (B, S, H / p, D)."""
        rows, positions, heads, width = x_BTHD.shape
        longest, ranks = longest_length(self.ranks, length), self.ranks
        given = x_BTHD.new_zeros(ranks, rows, longest, heads // ranks, width)
        given[:, :, :positions] = x_BTHD.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)  # type: ignore[no-untyped-call]
        taken = self._exchange(given)
        # Of each rank in turn, then in the order of the sequence.
        joined = taken.transpose(0, 1).flatten(1, 2)
        return joined.index_select(1, _places_held(ranks, length).to(x_BTHD.device))

    def to_positions(self, x_BSHD: Tensor, length: int) -> Tensor:
        """Undo `to_heads`: give all positions of own heads, take own ones of all: (B, T, H, D)."""
        ranks, longest = self.ranks, longest_length(self.ranks, length)
        rows, _, heads, width = x_BSHD.shape
        given = x_BSHD.new_zeros(ranks * longest, rows, heads, width)
        places_S = _places_held(ranks, length).to(x_BSHD.device)
        given[places_S] = x_BSHD.transpose(0, 1)
        given = given.view(ranks, longest, rows, heads, width)
        taken = self._exchange(given)[:, : own_length(self.rank, ranks, length)]
        return taken.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, given: Tensor) -> Tensor:
        taken = torch.empty_like(given)
        self._comm.alltoall(given, taken)
        self.moved_bytes += given.nbytes * (self.ranks - 1) // self.ranks
        return taken

    def close(self) -> None:
        self._comm.free()


# An evaluation has rows of many lengths.
@lru_cache(64)
def _places_held(ranks: int, length: int) -> Tensor:
    """Return, for each position of a sequence, its place in the shares of all ranks, each as long
    as the longest.
    """
    longest = longest_length(ranks, length)
    places = np.empty(length, np.int64)
    for rank in range(ranks):
        own = own_positions(rank, ranks, length)
        places[own] = rank * longest + np.arange(len(own))
    return torch.from_numpy(places)
