"""The plain reference: gather everything, then take the own part. All other algorithms are tested
against it.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.algorithms.trees import tree_split
from mpillm.comm.buffers import WHOLE, Buffer
from mpillm.comm.selection import CollectiveCall

if TYPE_CHECKING:
    from mpi4py import MPI

# Bounds the gathered memory: p pieces of 2 MiB of float64.
PIECE_ELEMENTS = 2**18


def reference(comm: "MPI.Intracomm", call: CollectiveCall, source: Buffer, target: Buffer) -> None:
    """Run `call`, apart from a mean's division. Every rank of `comm` calls it.

    Floats are summed in rank order in float64. With a fixed order they are summed in the canonical
    tree, in their own type, 16-bit floats in float32.
    """
    size, rank, operation = comm.size, comm.rank, call.operation
    if operation in ("allgather", "alltoall", "broadcast"):
        _move(comm, call, source, target)
        return
    total = _reduced(comm, call, source)
    if operation == "allreduce" or (operation == "reduce" and rank == call.root):
        target.octets[:] = total.octets
    elif operation == "reduce_scatter":
        first, stop = block_bounds(source.count, size)[rank : rank + 2]
        place = target.part(first, stop) if source is target else target
        place.octets[:] = total.raw(first, stop)


def _move(comm: "MPI.Intracomm", call: CollectiveCall, source: Buffer, target: Buffer) -> None:
    rank, bounds = comm.rank, block_bounds(target.count, comm.size)
    if call.operation == "broadcast":
        target.octets[:] = np.frombuffer(comm.bcast(source.octets.tobytes(), call.root), np.uint8)
    elif call.operation == "allgather":
        own = source if source is not target else source.part(bounds[rank], bounds[rank + 1])
        target.octets[:] = np.frombuffer(b"".join(comm.allgather(own.octets.tobytes())), np.uint8)
    else:
        blocks = [source.raw(first, stop).tobytes() for first, stop in pairwise(bounds)]
        target.octets[:] = np.frombuffer(b"".join(comm.alltoall(blocks)), np.uint8)


def _reduced(comm: "MPI.Intracomm", call: CollectiveCall, source: Buffer) -> Buffer:
    total = source.empty(source.count)
    for first in range(0, source.count, PIECE_ELEMENTS):
        stop = min(first + PIECE_ELEMENTS, source.count)
        gathered = source.empty(comm.size * (stop - first))
        comm.Allgather(source.raw(first, stop), gathered.octets)
        total.flat[first:stop] = _combined(
            gathered.flat.reshape(comm.size, stop - first), source.element, call
        )
    return total


def _combined(rows: Any, element: str, call: CollectiveCall) -> Any:
    """Reduce all rows to one; integers in their own type, in which they wrap as in the kernel."""
    if call.op in ("max", "min"):
        if isinstance(rows, np.ndarray):
            return rows.max(0) if call.op == "max" else rows.min(0)
        return rows.amax(0) if call.op == "max" else rows.amin(0)
    if element in WHOLE:
        return rows.sum(0, dtype=rows.dtype)
    if call.fixed_order:
        return _tree(_as(rows, element if element == "float64" else "float32"), 0, len(rows))
    # Row by row: the order of ranks is part of the definition.
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
