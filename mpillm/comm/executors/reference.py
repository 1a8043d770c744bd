"""Slow and plain: gather everything, then take one's own. What every other algorithm is tested by."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.algorithms.trees import tree_split
from mpillm.comm.buffers import WHOLE, Buffer
from mpillm.comm.selection import CollectiveCall

if TYPE_CHECKING:
    from mpi4py import MPI

PIECE_ELEMENTS = 2**18


def reference(comm: "MPI.Intracomm", wish: CollectiveCall, source: Buffer, target: Buffer) -> None:
    """Do what `wish` says, a mean's division apart. Floats are summed in rank order in float64, or in a fixed order in
    the canonical tree, in their own type (16-bit ones in float32). Every rank calls it.
    """
    size, rank, operation = comm.size, comm.rank, wish.operation
    if operation in ("allgather", "alltoall", "broadcast"):
        _move(comm, wish, source, target)
        return
    total = _reduced(comm, wish, source)
    if operation == "allreduce" or (operation == "reduce" and rank == wish.root):
        target.octets[:] = total.octets
    elif operation == "reduce_scatter":
        first, stop = block_bounds(source.count, size)[rank : rank + 2]
        place = target.part(first, stop) if source is target else target
        place.octets[:] = total.raw(first, stop)


def _move(comm: "MPI.Intracomm", wish: CollectiveCall, source: Buffer, target: Buffer) -> None:
    rank, bounds = comm.rank, block_bounds(target.count, comm.size)
    if wish.operation == "broadcast":
        target.octets[:] = np.frombuffer(comm.bcast(source.octets.tobytes(), wish.root), np.uint8)
    elif wish.operation == "allgather":
        own = source if source is not target else source.part(bounds[rank], bounds[rank + 1])
        target.octets[:] = np.frombuffer(b"".join(comm.allgather(own.octets.tobytes())), np.uint8)
    else:
        blocks = [source.raw(first, stop).tobytes() for first, stop in pairwise(bounds)]
        target.octets[:] = np.frombuffer(b"".join(comm.alltoall(blocks)), np.uint8)


def _reduced(comm: "MPI.Intracomm", wish: CollectiveCall, source: Buffer) -> Buffer:
    total = source.empty(source.count)
    for first in range(0, source.count, PIECE_ELEMENTS):
        stop = min(first + PIECE_ELEMENTS, source.count)
        gathered = source.empty(comm.size * (stop - first))
        comm.Allgather(source.raw(first, stop), gathered.octets)
        total.flat[first:stop] = _combined(
            gathered.flat.reshape(comm.size, stop - first), source.element, wish
        )
    return total


def _combined(rows: Any, element: str, wish: CollectiveCall) -> Any:
    """All rows as one; integers in their own type (they wrap alike)."""
    if wish.op in ("max", "min"):
        if isinstance(rows, np.ndarray):
            return rows.max(0) if wish.op == "max" else rows.min(0)
        return rows.amax(0) if wish.op == "max" else rows.amin(0)
    if element in WHOLE:
        return rows.sum(0, dtype=rows.dtype)
    if wish.fixed_order:
        return _tree(_as(rows, element if element == "float64" else "float32"), 0, len(rows))
    wide = _as(rows, "float64")
    total = wide[0]
    for row in wide[1:]:
        total += row
    return total


def _as(rows: Any, element: str) -> Any:
    if isinstance(rows, np.ndarray):
        return rows.astype(element)
    import torch

    return rows.to(getattr(torch, element))


def _tree(rows: Any, lo: int, hi: int) -> Any:
    if hi - lo == 1:
        return rows[lo]
    middle = tree_split(lo, hi)
    return _tree(rows, lo, middle) + _tree(rows, middle, hi)
