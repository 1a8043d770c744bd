"""The mesh: the job's ranks along named axes, `data=2 × pipeline=4`, a communicator for each axis.

Row-major, the last axis fastest: neighbours along the last axis are neighbours in rank order, which
launchers place on one node. So the axis that moves most bytes is named last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from mpillm.errors import LayoutError
from mpillm.machine.node_map import NodeMap, map_nodes

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it; `comm` joins the ranks that differ from it along this axis
    only.
    """

    name: str
    size: int
    rank: int
    comm: "MPI.Intracomm"
    node_map: NodeMap | None = None
    """The nodes of the ranks of `comm`; None where the axis was made by hand."""


class Mesh:
    """`Mesh(comm, {"data": 2, "pipeline": 2})`: every rank of `comm` makes it, with the same axes.

    `node_map`: of `comm`; without it MPI is asked. Raises LayoutError on every rank when the axes'
    product is not the number of ranks.
    """

    def __init__(
        self, comm: "MPI.Intracomm", axes: Mapping[str, int], node_map: NodeMap | None = None
    ) -> None:
        check_axes(axes, comm.size)
        self.comm = comm
        self.node_map = node_map or map_nodes(comm)
        self.sizes = dict(axes)
        self.coordinates = coordinates(comm.rank, self.sizes)
        self._axes = {name: self._split(name, (name,)) for name in self.sizes}
        self._joint: dict[str, Axis] = {}

    def _split(self, name: str, along: Sequence[str]) -> Axis:
        """Join the ranks that differ along the axes `along` alone."""
        sizes = {each: self.sizes[each] for each in along}
        size, ranks = math.prod(sizes.values()), ranks_along(self.coordinates, self.sizes, along)
        place = rank_at({each: self.coordinates[each] for each in along}, sizes)
        # The first rank of the axis names it among its parallels; any number that only they share
        # would do.
        axis_comm: MPI.Intracomm = self.comm.Split(ranks[0], key=place)  # type: ignore[assignment]
        return Axis(name, size, place, axis_comm, self.node_map.of_ranks(ranks))

    def axis(self, name: str) -> Axis:
        """Return the axis called `name`; raises LayoutError for a name that the mesh lacks."""
        if name not in self._axes:
            near = get_close_matches(name, self._axes, n=1, cutoff=0.0)
            raise LayoutError(
                f"the mesh {self.describe()} has no axis {name!r}; did you mean {near[0]!r}?"
            )
        return self._axes[name]

    def find(self, name: str) -> Axis | None:
        """Return the axis called `name`; None where the mesh has none."""
        return self._axes.get(name)

    def joint(self, names: Sequence[str]) -> Axis:
        """Return one axis over the ranks that differ along any of `names`, the last one fastest.

        Every rank of the mesh asks for the same, in the same order. It is freed with the mesh.
        """
        if len(names) == 1:
            return self.axis(names[0])
        name = " × ".join(names)
        if name not in self._joint:
            self._joint[name] = self._split(name, names)
        return self._joint[name]

    def describe(self) -> str:
        """Write the axes as `data=2 × pipeline=2`."""
        return describe(self.sizes)

    def free(self) -> None:
        """Free the axes' communicators; every rank calls it, and uses no axis afterwards."""
        for axis in (*self._axes.values(), *self._joint.values()):
            axis.comm.Free()
        self._axes.clear()
        self._joint.clear()


def describe(axes: Mapping[str, int]) -> str:
    """Write {"data": 2, "pipeline": 2} as `data=2 × pipeline=2`."""
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
    """Return the place of `rank` along each axis, row-major, the last axis fastest."""
    places: dict[str, int] = {}
    for name in reversed(list(axes)):
        rank, places[name] = divmod(rank, axes[name])
    return {name: places[name] for name in axes}


def rank_at(places: Mapping[str, int], axes: Mapping[str, int]) -> int:
    """Return the rank at `places`: the inverse of `coordinates`."""
    rank = 0
    for name, size in axes.items():
        rank = rank * size + places[name]
    return rank


def ranks_along(
    places: Mapping[str, int], axes: Mapping[str, int], along: Sequence[str]
) -> list[int]:
    """List the ranks that differ from the one at `places` along the axes `along` alone, the last of
    these fastest.
    """
    sizes = {name: axes[name] for name in along}
    return [
        rank_at({**places, **coordinates(place, sizes)}, axes)
        for place in range(math.prod(sizes.values()))
    ]


def by_hosts(comm: "MPI.Intracomm", node_map: NodeMap) -> "tuple[MPI.Intracomm, NodeMap]":
    """Reorder `comm` node by node, nodes in the order of their first ranks; rank 0 stays rank 0.

    Launchers may deal ranks out to nodes in turns. Every rank of `comm` calls it, with the map of
    `comm`; returns the new communicator and its map.
    """
    order = node_map.host_order
    ordered: MPI.Intracomm = comm.Split(0, key=order.index(comm.rank))  # type: ignore[assignment]
    return ordered, node_map.of_ranks(order)
