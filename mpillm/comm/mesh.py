"""The mesh: the job's ranks laid out along named axes, `data=2 × pipeline=4`, each axis with its
communicator.

Row-major, the last axis fastest: neighbours along the last axis are neighbours in rank order, which launchers
place on one node. So the axis that talks most is named last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from mpillm.errors import LayoutError

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it; `comm` joins the ranks that differ from it along this axis only."""

    name: str
    size: int
    rank: int
    comm: "MPI.Intracomm"


class Mesh:
    """`Mesh(comm, {"data": 2, "pipeline": 2})`: every rank of `comm` makes it, with the same axes.

    Raises LayoutError on every rank when the axes' product is not the number of ranks.
    """

    def __init__(self, comm: "MPI.Intracomm", axes: Mapping[str, int]) -> None:
        check_axes(axes, comm.size)
        self.comm = comm
        self.sizes = dict(axes)
        self.coordinates = coordinates(comm.rank, self.sizes)
        self._axes = {name: self._split(name) for name in self.sizes}

    def _split(self, name: str) -> Axis:
        others = {other: place for other, place in self.coordinates.items() if other != name}
        color = rank_at({**others, name: 0}, self.sizes)
        axis_comm: MPI.Intracomm = self.comm.Split(color, key=self.coordinates[name])  # type: ignore[assignment]
        return Axis(name, self.sizes[name], self.coordinates[name], axis_comm)

    def axis(self, name: str) -> Axis:
        """The axis called `name`; raises LayoutError for a name that the mesh has not."""
        if name not in self._axes:
            near = get_close_matches(name, self._axes, n=1, cutoff=0.0)
            raise LayoutError(
                f"the mesh {self.describe()} has no axis {name!r}; did you mean {near[0]!r}?"
            )
        return self._axes[name]

    def describe(self) -> str:
        return describe(self.sizes)

    def free(self) -> None:
        """Give the axes' communicators back to MPI; every rank calls it, and uses no axis afterwards."""
        for axis in self._axes.values():
            axis.comm.Free()
        self._axes.clear()


def describe(axes: Mapping[str, int]) -> str:
    """{"data": 2, "pipeline": 2} → `data=2 × pipeline=2`."""
    return " × ".join(f"{name}={size}" for name, size in axes.items())


def check_axes(axes: Mapping[str, int], ranks: int) -> None:
    """Raise LayoutError unless `axes` lay out exactly `ranks` ranks."""
    if not axes:
        raise LayoutError("a mesh needs at least one axis, such as data=4")
    for name, size in axes.items():
        if size < 1:
            raise LayoutError(
                f"mesh axis {name}={size} must be at least 1; give the ranks along {name}"
            )
    needed = math.prod(axes.values())
    if needed != ranks:
        raise LayoutError(
            f"mesh {describe(axes)} needs {needed} rank{'s' * (needed != 1)}, the job has {ranks}; "
            f"start with -n {needed} or change an axis"
        )


def coordinates(rank: int, axes: Mapping[str, int]) -> dict[str, int]:
    """Where `rank` stands along each axis, row-major, the last axis fastest."""
    places: dict[str, int] = {}
    for name in reversed(list(axes)):
        rank, places[name] = divmod(rank, axes[name])
    return {name: places[name] for name in axes}


def rank_at(places: Mapping[str, int], axes: Mapping[str, int]) -> int:
    """The inverse of `coordinates`."""
    rank = 0
    for name, size in axes.items():
        rank = rank * size + places[name]
    return rank


def by_hosts(comm: "MPI.Intracomm") -> "MPI.Intracomm":
    """`comm` with the ranks of each node side by side, nodes in the order of their first ranks; rank 0 stays rank 0.
    Every rank of `comm` calls it. Launchers may deal ranks out to nodes in turns.
    """
    ordered: MPI.Intracomm = comm.Split(0, key=host_order(first_ranks(comm)).index(comm.rank))  # type: ignore[assignment]
    return ordered


def first_ranks(comm: "MPI.Intracomm") -> list[int]:
    """For each rank of `comm` the first rank of its node. Every rank of `comm` calls it."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(comm.rank)
    node.Free()
    return comm.allgather(first)


def host_order(first_ranks: Sequence[int]) -> list[int]:
    """The ranks by node; `first_ranks[rank]` is the first rank of its node."""
    return sorted(range(len(first_ranks)), key=lambda rank: (first_ranks[rank], rank))


def local_ranks(comm: "MPI.Intracomm") -> int:
    """How many ranks of `comm` share this rank's node. Every rank of `comm` calls it."""
    firsts = first_ranks(comm)
    return firsts.count(firsts[comm.rank])


def hosts(comm: "MPI.Intracomm") -> int:
    """How many nodes `comm` spans. Every rank of `comm` calls it."""
    return len(set(first_ranks(comm)))


def on_one_node(comm: "MPI.Intracomm") -> bool:
    """Whether all ranks of `comm` share a node; the same answer on each. Every rank of `comm` calls it."""
    return local_ranks(comm) == comm.size
