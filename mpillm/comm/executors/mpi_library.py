"""The MPI library's own collectives as requests: the algorithm `mpi`, the baseline of all others.

float16 uses the library's own type where it has one. bfloat16 (and float16 elsewhere) uses a
user-defined operation over two-byte integers that calls the compiled kernel: the fastest that MPI
offers for it.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm import kernel
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import (
    ELEMENTS,
    LARGEST_COUNT,
    REDUCTIONS,
    SHORT_FLOATS,
    message_spans,
)
from mpillm.comm.executors.request import LocalRequest, MpiRequest, Operands, Request, chain
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float16": "UINT16_T",
    "bfloat16": "UINT16_T",
    "int8": "INT8_T",
    "int16": "INT16_T",
    "int32": "INT32_T",
    "int64": "INT64_T",
    "uint8": "UINT8_T",
    "uint16": "UINT16_T",
    "uint32": "UINT32_T",
    "uint64": "UINT64_T",
}


@functools.cache
def _own_half() -> "MPI.Datatype | None":
    """Return the library's own float16 where it can sum it; found by trying, on this rank alone."""
    from mpi4py import MPI

    half = getattr(MPI, "FLOAT16_T", MPI.DATATYPE_NULL)
    if half == MPI.DATATYPE_NULL:
        return None
    one, two = np.ones(1, np.float16), np.ones(1, np.float16)
    try:
        # Open MPI 4 without float16 has a type of no size, and summing it ends the process: ask the
        # size first.
        half.Get_size()
        MPI.SUM.Reduce_local([one, 1, half], [two, 1, half])
    except MPI.Exception:
        return None
    return half if two[0] == 2 else None


@functools.cache
def _user_operation(element: str, op: str) -> "MPI.Op":
    from mpi4py import MPI

    def reduce(source: Any, target: Any, datatype: "MPI.Datatype") -> None:
        kernel.combine(ELEMENTS.index(element), REDUCTIONS.index(op), target, source)

    return MPI.Op.Create(reduce, commute=True)


def type_and_op(element: str, op: str) -> "tuple[MPI.Datatype, MPI.Op]":
    """Return the MPI type and operation for `element`: the library's own where it has them."""
    from mpi4py import MPI

    if element in SHORT_FLOATS:
        half = _own_half() if element == "float16" else None
        if half is None:
            return MPI.UINT16_T, _user_operation(element, op)
        return half, getattr(MPI, op.upper())
    return getattr(MPI, TYPES[element]), getattr(MPI, op.upper())


def mpi_request(comm: "MPI.Intracomm", operation: str, operands: Operands) -> Request:
    """Prepare the library's own `operation`. Every rank of `comm` prepares the same."""
    make = {
        "allreduce": _allreduce,
        "reduce_scatter": _reduce_scatter,
        "allgather": _allgather,
        "reduce": _reduce,
        "broadcast": _broadcast,
        "alltoall": _alltoall,
    }[operation]
    return make(comm, operands, *type_and_op(operands.target.element, operands.op))


def mpi_barrier(comm: "MPI.Intracomm") -> Request:
    """Prepare the library's own barrier."""
    return MpiRequest(comm.Barrier, comm.Ibarrier)


def _in_spans(
    call: Callable[..., object],
    starting: "Callable[..., MPI.Request]",
    arguments: Callable[[int, int], tuple[Any, ...]],
    count: int,
) -> Request:
    """Make one request of as many calls as `count` elements need."""
    return _several(call, starting, [arguments(*span) for span in message_spans(count)])


def _several(
    call: Callable[..., object],
    starting: "Callable[..., MPI.Request]",
    arguments: Sequence[tuple[Any, ...]],
) -> Request:
    """Make one request of a call for each of `arguments`, in this order on every rank."""
    blocking = [functools.partial(call, *one) for one in arguments]
    starts = [functools.partial(starting, *one) for one in arguments]
    if len(arguments) == 1:
        return MpiRequest(blocking[0], starts[0])
    return MpiRequest(lambda: [each() for each in blocking], lambda: [each() for each in starts])


def _block_spans(bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut each rank's block into the spans of one call: (rank, first, stop), empty blocks left
    out.
    """
    return [
        (rank, first + start, first + end)
        for rank, (first, stop) in enumerate(pairwise(bounds))
        for start, end in message_spans(stop - first)
        if end > start
    ]


def _allreduce(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    from mpi4py import MPI

    source, target = operands.source, operands.target

    def arguments(first: int, stop: int) -> tuple[Any, ...]:
        given = MPI.IN_PLACE if operands.in_place else [source.raw(first, stop), stop - first, kind]
        return given, [target.raw(first, stop), stop - first, kind], op

    return _in_spans(comm.Allreduce, comm.Iallreduce, arguments, target.count)


def _reduce(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    from mpi4py import MPI

    source, target, root = operands.source, operands.target, operands.root

    def arguments(first: int, stop: int) -> tuple[Any, ...]:
        given = [source.raw(first, stop), stop - first, kind]
        if comm.rank != root:
            return given, None, op, root
        into = [target.raw(first, stop), stop - first, kind]
        return MPI.IN_PLACE if operands.in_place else given, into, op, root

    return _in_spans(comm.Reduce, comm.Ireduce, arguments, source.count)


def _broadcast(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    target = operands.target
    return _in_spans(
        comm.Bcast,
        comm.Ibcast,
        lambda first, stop: ([target.raw(first, stop), stop - first, kind], operands.root),
        target.count,
    )


def _reduce_scatter(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    source, target = operands.source, operands.target
    bounds = block_bounds(source.count, comm.size)
    counts = [stop - first for first, stop in pairwise(bounds)]
    first, stop = bounds[comm.rank], bounds[comm.rank + 1]
    if len(message_spans(source.count)) > 1:
        return _large_reduce_scatter(comm, operands, kind, op)
    # MPI puts an in-place result at the array's beginning; ours belongs into the own block.
    block = source.empty(stop - first) if operands.in_place else target
    given, into = [source.octets, source.count, kind], [block.octets, block.count, kind]
    call = MpiRequest(
        functools.partial(comm.Reduce_scatter, given, into, counts, op),
        functools.partial(comm.Ireduce_scatter, given, into, counts, op),
    )
    if not operands.in_place:
        return call
    return chain(call, LocalRequest(lambda: np.copyto(target.raw(first, stop), block.octets)))


def _large_reduce_scatter(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    """Reduce each block to its rank: MPI's own call counts the whole array in 31 bits."""
    from mpi4py import MPI

    source, target = operands.source, operands.target
    bounds = block_bounds(source.count, comm.size)
    offset = 0 if operands.in_place else bounds[comm.rank]

    def arguments(root: int, first: int, stop: int) -> tuple[Any, ...]:
        given: Any = [source.raw(first, stop), stop - first, kind]
        if root != comm.rank:
            return given, None, op, root
        into = [target.raw(first - offset, stop - offset), stop - first, kind]
        return MPI.IN_PLACE if operands.in_place else given, into, op, root

    spans = [arguments(*span) for span in _block_spans(bounds)]
    return _several(comm.Reduce, comm.Ireduce, spans)


def _allgather(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    from mpi4py import MPI

    source, target = operands.source, operands.target
    bounds = block_bounds(target.count, comm.size)
    counts = [stop - first for first, stop in pairwise(bounds)]
    if len(message_spans(target.count)) > 1:
        # MPI's own call counts the places of blocks in 31 bits: each rank sends its block to all.
        spans = [
            ([target.raw(first, stop), stop - first, kind], root)
            for root, first, stop in _block_spans(bounds)
        ]
        sent = _several(comm.Bcast, comm.Ibcast, spans)
        own = target.raw(bounds[comm.rank], bounds[comm.rank + 1])
        copied = LocalRequest(lambda: np.copyto(own, source.octets))
        return sent if operands.in_place else chain(copied, sent)
    given: Any = MPI.IN_PLACE if operands.in_place else [source.octets, source.count, kind]
    # The vector form: blocks differ by an element where the ranks do not divide the count.
    into: Any = [target.octets, (counts, bounds[:-1]), kind]
    return MpiRequest(
        functools.partial(comm.Allgatherv, given, into),
        functools.partial(comm.Iallgatherv, given, into),
    )


def _alltoall(
    comm: "MPI.Intracomm", operands: Operands, kind: "MPI.Datatype", op: "MPI.Op"
) -> Request:
    from mpi4py import MPI

    source, target = operands.source, operands.target
    # MPI takes the count of one rank's block here, not that of the array.
    each = target.count // comm.size
    if len(message_spans(each)) > 1:
        raise CommError(
            f"alltoall by the MPI library takes blocks of {LARGEST_COUNT:,} elements at most, not "
            f"{each:,}; send the array in parts, or name another algorithm"
        )
    given: Any = MPI.IN_PLACE if operands.in_place else [source.octets, each, kind]
    into: Any = [target.octets, each, kind]
    return MpiRequest(
        functools.partial(comm.Alltoall, given, into),
        functools.partial(comm.Ialltoall, given, into),
    )
