"""Channels: one-way connections between two ranks, known ahead and the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from mpillm.comm.selection import check_known
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.machine.cluster_profile import ClusterProfile, Way

WAYS = ("auto", "shared", "messages")


@dataclass(frozen=True)
class Channel:
    """A connection from `sender` to `receiver`, ranks of one communicator; messages keep order."""

    sender: int
    receiver: int
    nbytes: int
    """Bytes of the longest message."""

    def __str__(self) -> str:
        return f"rank {self.sender} → rank {self.receiver}, {self.nbytes:,} bytes"


def check_channels(comm: "MPI.Intracomm", channels: Sequence[Channel], way: str) -> None:
    """Check that all ranks of `comm` pass the same, valid channels and `way`. Every rank calls it.

    Raises CommError on every rank for a difference, a rank out of range, or a channel to itself.
    """
    # An allgather before the first check: a bad list on one rank must raise on all of them.
    everywhere: list[tuple[str, list[Channel]]] = comm.allgather((way, list(channels)))
    first_way, first_channels = everywhere[0]
    for rank, (other_way, other_channels) in enumerate(everywhere):
        if other_way != first_way:
            raise CommError(
                f"all ranks must choose one way, but rank 0 has {first_way!r} and rank {rank} "
                f"{other_way!r}"
            )
        for number, (one, other) in enumerate(zip_longest(first_channels, other_channels)):
            if one != other:
                raise CommError(
                    f"all ranks must have the same channels, but channel {number} is "
                    f"({one or 'none'}) on rank 0 and ({other or 'none'}) on rank {rank}"
                )
    check_known(way, WAYS, "way")
    for number, channel in enumerate(channels):
        ranks = range(comm.size)
        if channel.sender not in ranks or channel.receiver not in ranks or channel.nbytes < 0:
            raise CommError(
                f"channel {number} ({channel}) needs ranks from 0 to {comm.size - 1} and a "
                "length of 0 bytes or more"
            )
        if channel.sender == channel.receiver:
            raise CommError(
                f"channel {number} ({channel}) leads from a rank to itself; pass the array on "
                "without a message"
            )


def choose_ways(
    channels: Sequence[Channel],
    node_of: Sequence[int],
    way: str,
    profile: "ClusterProfile | None",
) -> "list[Way]":
    """Choose shared memory or messages for each channel; `node_of[rank]` numbers a rank's node.

    Raises CommError where `way` asks for shared memory between nodes.
    """
    ways: list[Way] = []
    for number, channel in enumerate(channels):
        same_node = node_of[channel.sender] == node_of[channel.receiver]
        if way == "shared" and not same_node:
            raise CommError(
                f"channel {number} ({channel}) leads to another node, which shares no memory; "
                "take way='auto'"
            )
        if way == "messages" or not same_node:
            ways.append("messages")
        elif way == "auto" and profile is not None:
            ways.append(profile.faster_way(channel.nbytes) or "shared")
        else:
            ways.append("shared")
    return ways
