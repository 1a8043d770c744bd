"""Reductions: sums over the ranks of a communicator, in place, by the algorithm that is fastest for the size.

- ring: our ring over point-to-point messages. Any element type, any count, the fewest bytes.
- native: the library's MPI_Allreduce, in pieces. The shortest latency; no 16-bit floats.
- reference: gather all, add in rank order in double precision. Slow and plain: what the others are tested by.
- auto: native for small arrays, ring for large ones, by the measurements in docs/notes.md.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mpillm.comm.algorithms import block_bounds, ring_allgather, ring_allreduce, ring_reduce_scatter
from mpillm.comm.buffers import ADDED_BY_TORCH, WHOLE, Buffer, as_buffer
from mpillm.comm.interpreter import Span, run
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

Algorithm = Literal["auto", "ring", "native", "reference"]

# A ring pays its latency 2(p−1) times, a library's tree about log2(p) times: the blocks must be worth the
# trips.
RING_BLOCK_BYTES = 4 * 1024 * 1024
# MPI's classic interface counts to 2³¹ − 1; some libraries err near it.
NATIVE_PIECE_ELEMENTS = 2**30
REFERENCE_PIECE_ELEMENTS = 2**18


def allreduce(comm: "MPI.Intracomm", array: Any, algorithm: Algorithm = "auto") -> None:
    """Replace `array` on every rank by the sum over the ranks of `comm`, in its own element type.

    `array`: see `buffers.py`; the same count and type on every rank. Every rank calls it, in the same order.
    Each algorithm gives all ranks the same bits. Raises CommError for what cannot travel.
    """
    buffer = as_buffer(array)
    chosen = choose(buffer, comm.size, algorithm)
    if comm.size == 1 or buffer.count == 0:
        return
    if chosen == "ring":
        run(ring_allreduce(comm.rank, comm.size), comm, buffer, block_bounds(buffer.count, comm.size))
    elif chosen == "native":
        _native(comm, buffer)
    else:
        _reference(comm, buffer)


def start_allreduce(comm: "MPI.Intracomm", array: Any) -> "list[MPI.Request]":
    """Begin a native allreduce of `array`; its sum is there once all the requests are complete.

    Most libraries move nothing unless called: Test the requests now and then during the work that should hide
    them. Every rank calls it, in the same order. Raises CommError for 16-bit floats (see `can_start`).
    """
    from mpi4py import MPI

    buffer = as_buffer(array)
    choose(buffer, comm.size, "native")
    return [comm.Iallreduce(MPI.IN_PLACE, buffer.flat[first:stop]) for first, stop in native_pieces(buffer.count)]


def can_start(array: Any) -> bool:
    """Whether `start_allreduce` takes `array`'s element type."""
    return as_buffer(array).element not in ADDED_BY_TORCH


def reduce_scatter(comm: "MPI.Intracomm", array: Any) -> Span:
    """Sum `array` over the ranks so that this rank's block is whole; return its (first, stop) in elements.

    The blocks are those of `block_bounds`; the others are left with part sums. By ring. Every rank calls it.
    """
    buffer = as_buffer(array)
    bounds = block_bounds(buffer.count, comm.size)
    run(ring_reduce_scatter(comm.rank, comm.size), comm, buffer, bounds)
    return bounds[comm.rank], bounds[comm.rank + 1]


def allgather(comm: "MPI.Intracomm", array: Any) -> None:
    """Fill `array` on every rank with each rank's own block of it, as `reduce_scatter` leaves them. By ring."""
    buffer = as_buffer(array)
    run(ring_allgather(comm.rank, comm.size), comm, buffer, block_bounds(buffer.count, comm.size))


def choose(buffer: Buffer, size: int, algorithm: Algorithm) -> Algorithm:
    """The algorithm to run for `buffer` on `size` ranks. Raises CommError for an unknown or an unfit one."""
    known = get_args(Algorithm)
    if algorithm not in known:
        near = get_close_matches(str(algorithm), known, n=1, cutoff=0.0)[0]
        raise CommError(f"no allreduce is called {algorithm!r}; did you mean {near!r}? Known: {', '.join(known)}")
    if algorithm == "native" and buffer.element in ADDED_BY_TORCH:
        raise CommError(f"MPI has no {buffer.element} to add; take allreduce = 'ring' or 'auto', or reduce in float32")
    if algorithm != "auto":
        return algorithm
    # Of the short types MPI lacks the floats, and Open MPI's sum of the integers saturates where others wrap.
    return "ring" if buffer.itemsize < 4 or buffer.octets.size >= size * RING_BLOCK_BYTES else "native"


def native_pieces(count: int) -> list[Span]:
    """Spans (first, stop) small enough for one call of MPI each."""
    return [(n, min(n + NATIVE_PIECE_ELEMENTS, count)) for n in range(0, count, NATIVE_PIECE_ELEMENTS)]


def _native(comm: "MPI.Intracomm", buffer: Buffer) -> None:
    from mpi4py import MPI

    for first, stop in native_pieces(buffer.count):
        comm.Allreduce(MPI.IN_PLACE, buffer.flat[first:stop])


def _reference(comm: "MPI.Intracomm", buffer: Buffer) -> None:
    for first in range(0, buffer.count, REFERENCE_PIECE_ELEMENTS):
        stop = min(first + REFERENCE_PIECE_ELEMENTS, buffer.count)
        gathered = buffer.empty(comm.size * (stop - first))
        comm.Allgather(buffer.raw(first, stop), gathered.octets)
        rows = gathered.flat.reshape(comm.size, stop - first)
        buffer.flat[first:stop] = _wide_sum(rows, buffer.element)


def _wide_sum(rows: Any, element: str) -> Any:
    """The rows' sum, one after the other: integers in their own type (they wrap alike), floats in double."""
    if element in WHOLE:
        return rows.sum(0, dtype=rows.dtype)
    wide = rows.astype(np.float64) if isinstance(rows, np.ndarray) else rows.double()
    total = wide[0]
    for row in wide[1:]:
        total += row
    return total
