"""The node map: which ranks share a node, asked of MPI once a job and then handed to all that need
it.

`map_nodes` is the only caller of MPI_Comm_split_type in the house. Communicators of a part of the
ranks take a sub-map (`NodeMap.of_ranks`), which needs no message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class NodeMap:
    """The ranks of a communicator by node."""

    nodes: tuple[tuple[int, ...], ...]
    """The ranks of each node, ascending; nodes in the order of their first ranks."""
    shares_memory: bool = False
    """Whether the ranks of each node have a team in shared memory; the communicator finds that out.
    """
    library: str = ""
    """What MPI_Get_library_version reports."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return sum(len(ranks) for ranks in self.nodes)

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks are on one node, with or without a team in shared memory."""
        return len(self.nodes) == 1

    @property
    def even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    @property
    def two_level(self) -> bool:
        """Whether a hierarchical collective can gain: several nodes, several ranks on one, shared
        memory.
        """
        return self.shares_memory and 1 < len(self.nodes) < self.size

    @property
    def keeps_order(self) -> bool:
        """Whether each node is a whole subtree of the canonical order: 2^k neighbouring ranks on
        every node.
        """
        each = len(self.nodes[0])
        in_order = all(
            ranks == tuple(range(i * each, (i + 1) * each)) for i, ranks in enumerate(self.nodes)
        )
        return in_order and each & (each - 1) == 0

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """The index of each rank's node."""
        places = {rank: node for node, ranks in enumerate(self.nodes) for rank in ranks}
        return tuple(places[rank] for rank in range(self.size))

    def local_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks on the node of `rank`, itself included."""
        return self.nodes[self.node_of[rank]]

    def local_rank(self, rank: int) -> int:
        """Return the place of `rank` among the ranks of its node, from 0."""
        return self.local_ranks(rank).index(rank)

    @property
    def host_order(self) -> list[int]:
        """All ranks, node by node."""
        return [rank for ranks in self.nodes for rank in ranks]

    def of_ranks(self, ranks: Sequence[int]) -> "NodeMap":
        """Return the map of a communicator whose rank i is rank `ranks[i]` of this one.

        Nothing is known of its shared memory yet.
        """
        nodes: dict[int, list[int]] = {}
        for new, rank in enumerate(ranks):
            nodes.setdefault(self.node_of[rank], []).append(new)
        return NodeMap(tuple(map(tuple, nodes.values())), False, self.library)

    def split(self, comm: "MPI.Intracomm") -> "MPI.Intracomm":
        """Make the communicator of this rank's node. Every rank of `comm`, whose map this is, calls
        it.
        """
        node: MPI.Intracomm = comm.Split(self.node_of[comm.rank], comm.rank)  # type: ignore[assignment]
        return node


def map_nodes(comm: "MPI.Intracomm") -> NodeMap:
    """Ask MPI which ranks of `comm` share a node. Every rank of `comm` calls it."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(comm.rank)
    node.Free()
    return NodeMap(nodes_by_first(comm.allgather(first)), False, MPI.Get_library_version())


def nodes_by_first(first_ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Gather the ranks of each node; `first_ranks[rank]` is the first rank of its node."""
    nodes: dict[int, list[int]] = {}
    for rank, first in enumerate(first_ranks):
        nodes.setdefault(first, []).append(rank)
    return tuple(map(tuple, nodes.values()))
