"""Exchange tokens with the owners of experts: all-to-alls of unequal blocks, none dropped.

Within a node each rank writes its rows straight into their places in the owner's inbox, in memory
that the ranks share; elsewhere they are blocks of MPI_Ialltoallv.

The law of the inboxes: a rank has two, which exchanges use in turns, and one barrier comes between
the writes and the reads of an exchange. A rank enters the barrier of the next exchange after its
reads of this one, so no rank writes into an inbox again before its owner has read it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mpillm.comm.backoff import Backoff
from mpillm.comm.buffers import as_buffer
from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.comm.shared.team import SharedRows
from mpillm.parallel.expert.expert_groups import INBOX_GROWTH
from mpillm.parallel.expert.token_routes import Counts, TokenPiece, TokenRoutes

if TYPE_CHECKING:
    from mpi4py import MPI

# What a warning says where shared memory has no room.
INSTEAD = "tokens pass to the owners of experts as messages, which is slower"
Arriving = Callable[[], Tensor]
"""Waits for the rows that others pass to this rank, and returns them."""


class TokenExchange:
    """The ranks of `axis`, which own `experts` experts together.

    Every rank of the axis makes it, and calls its methods together with the others, in one order.
    """

    def __init__(
        self,
        axis: Axis,
        experts: int,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self._group = group = Communicator(
            axis.comm, profile=profile, debug=debug, warn=warn, node_map=axis.node_map
        )
        self.rank, self.size, self._experts = axis.rank, axis.size, experts
        self.progress: Callable[[], None] | None = None
        """Called while this rank waits: others may need its messages before they come here."""
        self._barrier = group.prepare("barrier")
        self._turn = 0
        self._inboxes: list[SharedRows | None] = [None, None]
        self._counts: SharedRows | None = None
        if group.node_map.shares_memory and group.node_map.on_one_node:
            # Two rows a rank, in turns as the inboxes are.
            self._counts = group.allocate(2 * experts, "int64", INSTEAD)
        self._row_types: dict[int, MPI.Datatype] = {}

    @property
    def is_shared(self) -> bool:
        """Whether rows pass through memory that the ranks share."""
        return self._counts is not None

    def routes(self, counts: list[int]) -> TokenRoutes:
        """Gather the counts of all ranks; `counts`: the rows of this rank for each expert."""
        own = np.array(counts, np.int64)
        if self._counts is None:
            everywhere = np.empty((self.size, self._experts), np.int64)
            self._wait(self._group.comm.Iallgather(own, everywhere))
            return TokenRoutes(everywhere)
        self._turn = 1 - self._turn
        part = slice(self._turn * self._experts, (self._turn + 1) * self._experts)
        rows = [octets.view(np.int64)[part] for octets in self._counts.octets]
        rows[self.rank][:] = own
        self._meet()
        return TokenRoutes(np.stack(rows))

    def to_owners(self, x_MC: Tensor, routes: TokenRoutes) -> Tensor:
        """Return the rows of all ranks for this rank's experts, from those of this rank."""
        return self.start_to_owners(x_MC, routes)()

    def start_to_owners(self, x_MC: Tensor, routes: TokenRoutes) -> Arriving:
        """Start `to_owners`, and return what waits for its result: call it ahead of any other
        method.
        """
        count = sum(routes.counts_of(self.rank))
        if self._find_inboxes(x_MC, routes):
            return self._through_inboxes(x_MC, list(routes.to_owners(self.rank)), count)
        sent, received = routes.block_rows[self.rank], routes.block_rows[:, self.rank]
        arriving = self._by_messages(x_MC, sent, received)
        # As they arrive, by sender and then by expert.
        by_sender = routes.by_sender(self.rank).T
        return lambda: _reordered(arriving(), by_sender)

    def to_senders(self, y_MC: Tensor, routes: TokenRoutes) -> Tensor:
        """Return the results of this rank's rows, from those of this rank's experts."""
        count = int(routes.block_rows[self.rank].sum())
        if self._find_inboxes(y_MC, routes):
            return self._through_inboxes(y_MC, list(routes.to_senders(self.rank)), count)()
        rows = _reordered(y_MC, routes.by_sender(self.rank))
        sent, received = routes.block_rows[:, self.rank], routes.block_rows[self.rank]
        return self._by_messages(rows, sent, received)()

    # ---- within a node ----

    def _find_inboxes(self, rows: Tensor, routes: TokenRoutes) -> bool:
        """Take the next inboxes, with room for the longest of these rows; False without room."""
        if self._counts is None:
            return False
        self._turn = 1 - self._turn
        needed = routes.most_rows * rows.shape[1] * rows.element_size()
        inbox = self._inboxes[self._turn]
        if inbox is not None and inbox.count >= needed:
            return True
        # All ranks know all counts, so all come here or none. The others' reads of the old memory
        # are over, as those of an inbox that is written again are.
        if inbox is not None:
            inbox.free()
        inbox = self._group.allocate(int(INBOX_GROWTH * needed) + 1, "uint8", INSTEAD)
        self._inboxes[self._turn] = inbox
        if inbox is None:
            self._counts = None
        return inbox is not None

    def _through_inboxes(self, rows: Tensor, pieces: list[TokenPiece], count: int) -> Arriving:
        """Write `pieces` of `rows` into inboxes; `count` rows arrive in the own."""
        inbox = self._inboxes[self._turn]
        assert inbox is not None
        own = rows.detach().cpu()
        views = [_rows_of(octets, own) for octets in inbox.octets]
        for piece in pieces:
            place = views[piece.peer][piece.received : piece.received + piece.rows]
            place.copy_(own[piece.sent : piece.sent + piece.rows])
        arrived, device = views[self.rank][:count], rows.device

        def finish() -> Tensor:
            self._meet()
            # A copy: autograd keeps it, and the inbox is written again.
            return arrived.to(device, copy=True)

        return finish

    def _meet(self) -> None:
        """Return when every rank has come here: each sees what the others wrote before."""
        if self.progress is None:
            self._barrier.run()
            return
        self._barrier.start()
        back_off = Backoff()
        while not self._barrier.test():
            self.progress()
            back_off()

    # ---- between nodes ----

    def _by_messages(self, rows: Tensor, sent: Counts, received: Counts) -> Arriving:
        """Exchange blocks of rows, in the order of ranks."""
        given = rows.detach().cpu().contiguous()
        width = given.shape[1]
        taken = torch.empty(int(received.sum()), width, dtype=given.dtype)
        # Counts of whole rows, not of bytes: those of a call of MPI end at 2³¹.
        row = self._row_type(width * given.element_size())
        request = self._group.comm.Ialltoallv(
            [as_buffer(given).octets, _spans(sent), row],
            [as_buffer(taken).octets, _spans(received), row],
        )
        device = rows.device

        def finish() -> Tensor:
            self._wait(request)
            return taken.to(device)

        return finish

    def _row_type(self, nbytes: int) -> "MPI.Datatype":
        from mpi4py import MPI

        if nbytes not in self._row_types:
            self._row_types[nbytes] = MPI.BYTE.Create_contiguous(nbytes).Commit()
        return self._row_types[nbytes]

    def _wait(self, request: "MPI.Request") -> None:
        back_off = Backoff()
        while not request.Test():
            if self.progress is not None:
                self.progress()
            back_off()

    def close(self) -> None:
        """Free memory, types and the communicator. Every rank calls it."""
        for rows in (*self._inboxes, self._counts):
            if rows is not None:
                rows.free()
        for row in self._row_types.values():
            row.Free()
        self._row_types.clear()
        self._group.free()


def _spans(counts: Counts) -> tuple[list[int], list[int]]:
    """Return the counts of blocks, and their places: each begins where the one before ends."""
    return counts.tolist(), (np.cumsum(counts) - counts).tolist()


def _rows_of(octets: Any, like: Tensor) -> Tensor:
    """View the whole rows of an inbox, of the width and the dtype of `like`."""
    width = like.shape[1]
    whole = len(octets) // (width * like.element_size()) * width * like.element_size()
    return torch.from_numpy(octets[:whole]).view(like.dtype).view(-1, width)


def _reordered(rows: Tensor, blocks: Counts) -> Tensor:
    """Return `rows`, which are blocks of (i, j) in the order of i, in the order of j; `blocks[i,
    j]`: the rows of each.
    """
    pieces = torch.split(rows, blocks.reshape(-1).tolist())
    first, second = blocks.shape
    return torch.cat([pieces[i * second + j] for j in range(second) for i in range(first)])
