"""Edges: the ways that messages take between the ranks of a communicator, known ahead and alike on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, Protocol

from mpillm.comm.selection import check_known
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

Way = Literal["shared", "messages"]
WAYS = ("auto", "shared", "messages")


@dataclass(frozen=True)
class Channel:
    """One way between two ranks of a communicator: its messages arrive in the order in which they were sent."""

    sender: int
    receiver: int
    nbytes: int
    """Of the longest message."""

    def __str__(self) -> str:
        return f"rank {self.sender} → rank {self.receiver}, {self.nbytes:,} bytes"


class HandoverProfile(Protocol):
    """What a cluster's profile answers; profile.py has it."""

    def faster_way(self, nbytes: int) -> Way | None:
        """The way within a node that hands a message over sooner; None where that was not measured."""


def check_edges(comm: "MPI.Intracomm", edges: Sequence[Channel], way: str) -> None:
    """Raise CommError, on every rank, unless all ranks have the same edges, each between two ranks of `comm`."""
    everywhere: list[tuple[str, list[Channel]]] = comm.allgather((way, list(edges)))
    first_way, first_edges = everywhere[0]
    for rank, (other_way, other_edges) in enumerate(everywhere):
        if other_way != first_way:
            raise CommError(
                f"all ranks must choose one way, but rank 0 has {first_way!r} and rank {rank} {other_way!r}"
            )
        for number, (one, other) in enumerate(zip_longest(first_edges, other_edges)):
            if one != other:
                raise CommError(
                    f"all ranks must have the same edges, but edge {number} is ({one or 'none'}) on rank 0 and "
                    f"({other or 'none'}) on rank {rank}"
                )
    check_known(way, WAYS, "way")
    for number, edge in enumerate(edges):
        if not (0 <= edge.sender < comm.size and 0 <= edge.receiver < comm.size) or edge.nbytes < 0:
            raise CommError(
                f"edge {number} ({edge}) needs ranks from 0 to {comm.size - 1} and bytes of 0 at least"
            )
        if edge.sender == edge.receiver:
            raise CommError(
                f"edge {number} ({edge}) leads from a rank to itself; hand the array on without a message"
            )


def wished_ways(
    edges: Sequence[Channel], node_of: Sequence[int], way: str, profile: HandoverProfile | None
) -> list[Way]:
    """Which way each edge is to go. `node_of`: a number for the node of each rank.

    Raises CommError where shared memory is asked for between nodes.
    """
    return [_wished_way(number, edge, node_of, way, profile) for number, edge in enumerate(edges)]


def _wished_way(
    number: int, edge: Channel, node_of: Sequence[int], way: str, profile: HandoverProfile | None
) -> Way:
    together = node_of[edge.sender] == node_of[edge.receiver]
    if way == "shared" and not together:
        raise CommError(
            f"edge {number} ({edge}) leads to another node, which shares no memory; take way='auto'"
        )
    if way == "messages" or not together:
        return "messages"
    known = profile.faster_way(edge.nbytes) if way == "auto" and profile is not None else None
    return known or "shared"
