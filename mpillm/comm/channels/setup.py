"""Which way each edge goes, and the mailboxes of a node's ranks: each rank's outgoing ones in its own row."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mpillm.comm import kernel
from mpillm.comm.channels.channel import Channel, HandoverProfile, Way, wished_ways
from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.comm.shared.team import processes, spins_of
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

# One that the receiver reads and one that the sender fills meanwhile. A rank that is further ahead keeps its arrays in
# the outbox: the receiver has two messages to work on before it can miss them.
SLOTS = 2


def open_ways(
    comm: "MPI.Intracomm",
    edges: Sequence[Channel],
    way: str,
    profile: HandoverProfile | None,
    warn: Callable[[str], None],
) -> tuple[list[Way], dict[int, kernel.SpscQueue]]:
    """Which way each edge goes, and this rank's mailboxes by edge. Every rank of `comm` calls it."""
    from mpi4py import MPI

    node: MPI.Intracomm = comm.Split_type(MPI.COMM_TYPE_SHARED)  # type: ignore[assignment]
    try:
        node_of: list[int] = comm.allgather(node.bcast(comm.rank))
        ways: list[Way] = comm.bcast(wished_ways(edges, node_of, way, profile))
        boxes = _open_mailboxes(
            comm, node, {n: edge for n, edge in enumerate(edges) if ways[n] == "shared"}
        )
    finally:
        node.Free()
    if not isinstance(boxes, str):
        return ways, boxes
    if way == "shared":
        raise CommError(f"{boxes}; make room there, or take way='auto'")
    if comm.rank == 0:
        warn(
            f"{boxes}; what is handed over within the node falls back to messages, which is slower"
        )
    return ["messages"] * len(edges), {}


def _open_mailboxes(
    comm: "MPI.Intracomm", node: "MPI.Intracomm", edges: Mapping[int, Channel]
) -> dict[int, kernel.SpscQueue] | str:
    """This rank's ends of those of `edges` that it has a part in; or, on every rank of `comm`, why they can't be had.

    Every rank of `comm` calls it, with its node's ranks and all edges (by number) within nodes.
    """
    members: list[int] = node.allgather(comm.rank)
    places, row_bytes = lay_out({n: edge for n, edge in edges.items() if edge.sender in members})
    memory = share_segment(node, row_bytes) if row_bytes else ""
    reasons: list[str] = comm.allgather(memory if isinstance(memory, str) else "")
    if any(reasons):
        return next(filter(None, reasons))
    own = {n: edge for n, edge in edges.items() if comm.rank in (edge.sender, edge.receiver)}
    alive, spins = processes(node), spins_of(node)

    def open_one(number: int, edge: Channel) -> kernel.SpscQueue:
        assert isinstance(memory, SharedSegment)
        first, stop = places[number]
        sends = edge.sender == comm.rank
        peer = edge.receiver if sends else edge.sender
        return kernel.SpscQueue(
            memory.rows[members.index(edge.sender)][first:stop],
            SLOTS,
            edge.nbytes,
            sends,
            peer,
            alive[members.index(peer)],
            spins,
            CommError,
        )

    return {number: open_one(number, edge) for number, edge in own.items()}


def lay_out(edges: Mapping[int, Channel]) -> tuple[dict[int, tuple[int, int]], int]:
    """Where in its sender's row each edge's mailbox lies, (first, stop) in bytes, and what the longest row takes."""
    places: dict[int, tuple[int, int]] = {}
    used: dict[int, int] = {}
    for number, edge in edges.items():
        first = used.get(edge.sender, 0)
        used[edge.sender] = first + kernel.spsc_queue_bytes(SLOTS, edge.nbytes)
        places[number] = first, used[edge.sender]
    return places, max(used.values(), default=0)
