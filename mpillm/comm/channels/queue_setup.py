"""Set up the channels of a node: choose each channel's way, map the SPSC queues."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mpillm.comm import kernel
from mpillm.comm.channels.channel import Channel, choose_ways
from mpillm.comm.shared.segment import SharedSegment, share_segment
from mpillm.comm.shared.team import process_ids, spins_of
from mpillm.errors import CommError
from mpillm.machine.node_map import NodeMap

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.machine.cluster_profile import ClusterProfile, Way

# Double buffering: the receiver reads one slot while the sender fills the other. A sender further
# ahead keeps its arrays in its send queue, as the receiver has two messages to work on by then.
SLOTS = 2


def open_channels(
    comm: "MPI.Intracomm",
    node_map: NodeMap,
    channels: Sequence[Channel],
    way: str,
    profile: "ClusterProfile | None",
    warn: Callable[[str], None],
) -> "tuple[list[Way], dict[int, kernel.SpscQueue]]":
    """Return each channel's way, and this rank's ends of the queues by channel number.

    Every rank of `comm` calls it. Without room in shared memory all channels fall back to messages;
    rank 0 warns. Raises CommError on every rank where `way` asks for shared memory without room.
    """
    node = node_map.split(comm)
    try:
        # Rank 0 decides for all: profiles are files, and ranks may have read different ones.
        ways: list[Way] = comm.bcast(choose_ways(channels, node_map.node_of, way, profile))
        shared = {n: channel for n, channel in enumerate(channels) if ways[n] == "shared"}
        queues = _open_queues(comm, node, shared)
    finally:
        node.Free()
    if not isinstance(queues, str):
        return ways, queues
    if way == "shared":
        raise CommError(f"{queues}; make room there, or take way='auto'")
    if comm.rank == 0:
        warn(f"{queues}; channels within the node fall back to messages, which is slower")
    return ["messages"] * len(channels), {}


def _open_queues(
    comm: "MPI.Intracomm", node: "MPI.Intracomm", channels: Mapping[int, Channel]
) -> dict[int, kernel.SpscQueue] | str:
    """Map this rank's ends of the queues; or return, on every rank of `comm`, why that failed.

    Every rank of `comm` calls it, with its `node` and all channels within nodes, by number.
    """
    members: list[int] = node.allgather(comm.rank)
    places, row_bytes = place_queues({n: c for n, c in channels.items() if c.sender in members})
    memory = share_segment(node, row_bytes) if row_bytes else ""
    # A node without room makes all nodes fall back, so that ways stay equal on every rank.
    reasons: list[str] = comm.allgather(memory if isinstance(memory, str) else "")
    if any(reasons):
        return next(filter(None, reasons))
    own = {n: c for n, c in channels.items() if comm.rank in (c.sender, c.receiver)}
    processes, spins = process_ids(node), spins_of(node)

    def open_queue(number: int, channel: Channel) -> kernel.SpscQueue:
        assert isinstance(memory, SharedSegment)
        first, stop = places[number]
        sends = channel.sender == comm.rank
        peer = channel.receiver if sends else channel.sender
        return kernel.SpscQueue(
            memory.rows[members.index(channel.sender)][first:stop],
            SLOTS,
            channel.nbytes,
            sends,
            peer,
            processes[members.index(peer)],
            spins,
            CommError,
        )

    return {number: open_queue(number, channel) for number, channel in own.items()}


def place_queues(channels: Mapping[int, Channel]) -> tuple[dict[int, tuple[int, int]], int]:
    """Place each channel's queue in its sender's row of the segment.

    Returns (first, stop) in bytes by channel number, and the bytes of the longest row. The sender's
    row holds the queue, so that its pages are near the cores of the rank that writes them.
    """
    places: dict[int, tuple[int, int]] = {}
    used: dict[int, int] = {}
    for number, channel in channels.items():
        first = used.get(channel.sender, 0)
        used[channel.sender] = first + kernel.spsc_queue_bytes(SLOTS, channel.nbytes)
        places[number] = first, used[channel.sender]
    return places, max(used.values(), default=0)
