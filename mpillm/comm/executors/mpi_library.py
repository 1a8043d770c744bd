"""The MPI library's own collectives as stages: what `native` means, and what every other algorithm is measured by.

float16 goes by the library's own type where it has one. bfloat16 (and float16 elsewhere) goes by a user-defined
operation over two-byte integers that calls the compiled kernel: the fastest that MPI offers for it.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm import kernel
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import ELEMENTS, REDUCTIONS, SHORT_FLOATS, Buffer
from mpillm.comm.executors.request import LocalRequest, MpiRequest, Request, chain

if TYPE_CHECKING:
    from mpi4py import MPI

# MPI's classic interface counts to 2³¹ − 1; some libraries err near it.
PIECE_ELEMENTS = 2**30
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


def pieces(count: int) -> list[tuple[int, int]]:
    """Spans (first, stop) small enough for one call of MPI each."""
    return [(n, min(n + PIECE_ELEMENTS, count)) for n in range(0, count, PIECE_ELEMENTS)]


@functools.cache
def _own_half() -> "MPI.Datatype | None":
    """The library's own float16, where it can be summed: asked of the library itself, on this rank alone."""
    from mpi4py import MPI

    half = getattr(MPI, "FLOAT16_T", MPI.DATATYPE_NULL)
    if half == MPI.DATATYPE_NULL:
        return None
    one, two = np.ones(1, np.float16), np.ones(1, np.float16)
    try:
        # Open MPI 4 without it still hands out a type, which has no size, and a sum of which ends the process.
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
    """The MPI type and operation for `element`: the library's own where it has them."""
    from mpi4py import MPI

    if element in SHORT_FLOATS:
        half = _own_half() if element == "float16" else None
        if half is None:
            return MPI.UINT16_T, _user_operation(element, op)
        return half, getattr(MPI, op.upper())
    return getattr(MPI, TYPES[element]), getattr(MPI, op.upper())


def stage(
    comm: "MPI.Intracomm", operation: str, source: Buffer, target: Buffer, op: str, root: int
) -> Request:
    """The library's `operation`; `source` is `target` where it works in place. Every rank prepares the same."""
    make: Callable[..., Request] = {
        "allreduce": _allreduce,
        "reduce_scatter": _reduce_scatter,
        "allgather": _allgather,
        "reduce": _reduce,
        "broadcast": _broadcast,
        "alltoall": _alltoall,
    }[operation]
    return make(comm, source, target, *type_and_op(target.element, op), root)


def barrier(comm: "MPI.Intracomm") -> Request:
    return MpiRequest(comm.Barrier, comm.Ibarrier)


def _calls(
    blocking: list[Callable[[], object]], starting: list[Callable[[], "MPI.Request"]]
) -> Request:
    """One stage of several calls, for arrays that one call cannot count."""
    if len(blocking) == 1:
        return MpiRequest(blocking[0], starting[0])
    return MpiRequest(lambda: [call() for call in blocking], lambda: [call() for call in starting])


def _in_pieces(
    call: Any, starting: Any, arguments: Callable[[int, int], tuple[Any, ...]], count: int
) -> Request:
    spans = [arguments(first, stop) for first, stop in pieces(count)] or [arguments(0, 0)]
    return _calls(
        [functools.partial(call, *span) for span in spans],
        [functools.partial(starting, *span) for span in spans],
    )


def _allreduce(comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int) -> Request:
    from mpi4py import MPI

    def arguments(first: int, stop: int) -> tuple[Any, ...]:
        given = MPI.IN_PLACE if source is target else [source.raw(first, stop), stop - first, kind]
        return given, [target.raw(first, stop), stop - first, kind], op

    return _in_pieces(comm.Allreduce, comm.Iallreduce, arguments, target.count)


def _reduce(comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int) -> Request:
    from mpi4py import MPI

    def arguments(first: int, stop: int) -> tuple[Any, ...]:
        given = [source.raw(first, stop), stop - first, kind]
        if comm.rank != root:
            return given, None, op, root
        into = [target.raw(first, stop), stop - first, kind]
        return MPI.IN_PLACE if source is target else given, into, op, root

    return _in_pieces(comm.Reduce, comm.Ireduce, arguments, source.count)


def _broadcast(comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int) -> Request:
    return _in_pieces(
        comm.Bcast,
        comm.Ibcast,
        lambda first, stop: ([target.raw(first, stop), stop - first, kind], root),
        target.count,
    )


def _reduce_scatter(
    comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int
) -> Request:
    bounds = block_bounds(source.count, comm.size)
    counts = [stop - first for first, stop in pairwise(bounds)]
    first, stop = bounds[comm.rank], bounds[comm.rank + 1]
    # MPI puts an in-place result at the array's beginning; ours belongs into the own block.
    block = source.empty(stop - first) if source is target else target
    given, into = [source.octets, source.count, kind], [block.octets, block.count, kind]
    call = MpiRequest(
        functools.partial(comm.Reduce_scatter, given, into, counts, op),
        functools.partial(comm.Ireduce_scatter, given, into, counts, op),
    )
    if source is not target:
        return call
    return chain(call, LocalRequest(lambda: np.copyto(target.raw(first, stop), block.octets)))


def _allgather(comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int) -> Request:
    from mpi4py import MPI

    bounds = block_bounds(target.count, comm.size)
    counts = [stop - first for first, stop in pairwise(bounds)]
    given = MPI.IN_PLACE if source is target else [source.octets, source.count, kind]
    into = [target.octets, (counts, bounds[:-1]), kind]
    return MpiRequest(
        functools.partial(comm.Allgatherv, given, into),
        functools.partial(comm.Iallgatherv, given, into),
    )


def _alltoall(comm: Any, source: Buffer, target: Buffer, kind: Any, op: Any, root: int) -> Request:
    from mpi4py import MPI

    each = target.count // comm.size
    given = MPI.IN_PLACE if source is target else [source.octets, each, kind]
    into = [target.octets, each, kind]
    return MpiRequest(
        functools.partial(comm.Alltoall, given, into),
        functools.partial(comm.Ialltoall, given, into),
    )
