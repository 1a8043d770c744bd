"""Collectives by NCCL, through CuPy: enqueued in the caller's stream, without the host.

NCCL has blocks of equal length only. Where block lengths differ by an element, a group of calls,
one a block, replaces the collective.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mpillm.comm.algorithms.schedule import REDUCING, block_bounds
from mpillm.comm.gpu.device_buffer import DeviceBuffer, load_cupy
from mpillm.comm.gpu.streams import stream_at
from mpillm.comm.selection import CollectiveCall
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

TYPES = {
    "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
    "float16": "NCCL_FLOAT16",
    "bfloat16": "NCCL_BFLOAT16",
    "int8": "NCCL_INT8",
    "uint8": "NCCL_UINT8",
    "int32": "NCCL_INT32",
    "uint32": "NCCL_UINT32",
    "int64": "NCCL_INT64",
    "uint64": "NCCL_UINT64",
}


def join(comm: "MPI.Intracomm", node: int, device: int) -> "Nccl | str":
    """Join the ranks' GPUs by NCCL; or return, on every rank, why that failed.

    Every rank of `comm` calls it. `node`: a number of this rank's node. `device`: its GPU.
    """
    reason, place = _found(device)
    found: list[tuple[str, int, str]] = comm.allgather((reason, node, place))
    reason = next(
        (f"rank {rank}: {text}" for rank, (text, _, _) in enumerate(found) if text), ""
    ) or _crowded(found)
    if reason:
        return reason
    # All ranks take the same branches from here on, because each reason is shared first.
    cupy = load_cupy()
    from cupy.cuda import nccl

    joined: Any = None
    ticket: Any
    try:
        ticket, reason = (nccl.get_unique_id(), "") if comm.rank == 0 else (None, "")
    except RuntimeError as failure:
        ticket, reason = None, str(failure)
    ticket, reason = comm.bcast((ticket, reason))
    if reason:
        return str(reason)
    try:
        with cupy.cuda.Device(device):
            joined = nccl.NcclCommunicator(comm.size, ticket, comm.rank)
    except RuntimeError as failure:
        reason = str(failure)
    reasons: list[str] = comm.allgather(reason)
    if any(reasons):
        return next(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)
    return Nccl(joined, comm.rank, comm.size, device)


def _found(device: int) -> tuple[str, str]:
    """Return (why this rank has no NCCL, its GPU's PCI bus id)."""
    try:
        cupy = load_cupy()
    except CommError as failure:
        return str(failure), ""
    from cupy.cuda import nccl

    if not nccl.available:
        return "CuPy finds no NCCL library; install nvidia-nccl-cu12 (or -cu13)", ""
    return "", str(cupy.cuda.runtime.deviceGetPCIBusId(device))


def _crowded(found: Sequence[tuple[str, int, str]]) -> str:
    first: dict[tuple[int, str], int] = {}
    for rank, (_, node, place) in enumerate(found):
        # Two ranks of a node with one PCI bus id: NCCL refuses a duplicate GPU.
        other = first.setdefault((node, place), rank)
        if other != rank:
            return f"NCCL needs a GPU a rank, and ranks {other} and {rank} share the one at {place}"
    return ""


class Nccl:
    """An NCCL communicator, which belongs to one GPU a rank; `join` makes it."""

    def __init__(self, joined: Any, rank: int, size: int, device: int) -> None:
        self._joined, self._rank, self._size, self.device = joined, rank, size, device
        self._cupy = load_cupy()
        from cupy.cuda import nccl

        self._nccl: Any = nccl

    def lacks(self, operation: str, element: str, device: int) -> str:
        """Return why NCCL can't do `operation` on `element` on GPU `device`; "" where it can."""
        if device != self.device:
            return f"NCCL is bound to GPU {self.device} here, and the array is on GPU {device}"
        if operation in REDUCING and not hasattr(self._nccl, TYPES.get(element, "")):
            return f"NCCL, as CuPy has it, does not sum {element}"
        return ""

    def prepare(
        self, call: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> Callable[[int], None]:
        """Prepare a function that enqueues `call` in a stream, given by its handle.

        `source` is `target` for a call in place. Every rank enqueues in the same order. A mean is
        left a sum: the caller scales it.
        """
        reduction = getattr(self._nccl, f"NCCL_{'SUM' if call.op == 'mean' else call.op.upper()}")
        # Moved data are bytes: NCCL has no 16-bit integers.
        moving = call.operation not in REDUCING
        kind = self._nccl.NCCL_UINT8 if moving else getattr(self._nccl, TYPES[source.element])
        unit = source.itemsize if moving else 1
        make: Callable[..., Callable[[int], None]] = {
            "allreduce": self._allreduce,
            "reduce_scatter": self._reduce_scatter,
            "allgather": self._allgather,
            "broadcast": self._broadcast,
            "reduce": self._reduce,
            "alltoall": self._alltoall,
        }[call.operation]
        work = make(source, target, kind, unit if moving else reduction, call.root)

        def on_device(stream: int) -> None:
            with self._cupy.cuda.Device(self.device):
                work(stream)

        return on_device

    @contextmanager
    def _together(self) -> Iterator[None]:
        # Without a group, each send would wait for its receive, in different orders on the ranks.
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def _allreduce(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, op: int, root: int
    ) -> Any:
        return lambda stream: self._joined.allReduce(
            source.pointer, target.pointer, source.count, kind, op, stream
        )

    def _reduce(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, op: int, root: int
    ) -> Any:
        into = target.pointer if self._rank == root else source.pointer
        return lambda stream: self._joined.reduce(
            source.pointer, into, source.count, kind, op, root, stream
        )

    def _broadcast(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, unit: int, root: int
    ) -> Any:
        count = target.count * unit
        return lambda stream: self._joined.broadcast(
            target.pointer, target.pointer, count, kind, root, stream
        )

    def _reduce_scatter(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, op: int, root: int
    ) -> Any:
        bounds = block_bounds(source.count, self._size)
        into = source.at(bounds[self._rank]) if source is target else target.pointer
        if source.count % self._size == 0:
            each = source.count // self._size
            return lambda stream: self._joined.reduceScatter(
                source.pointer, into, each, kind, op, stream
            )

        def apart(stream: int) -> None:
            with self._together():
                for block, (first, stop) in enumerate(pairwise(bounds)):
                    if first < stop:
                        # Only the root writes its result: other ranks pass the source's address.
                        result = into if block == self._rank else source.at(first)
                        self._joined.reduce(
                            source.at(first), result, stop - first, kind, op, block, stream
                        )

        return apart

    def _allgather(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, unit: int, root: int
    ) -> Any:
        bounds = block_bounds(target.count, self._size)
        given = target.at(bounds[self._rank]) if source is target else source.pointer
        if target.count % self._size == 0:
            each = target.count // self._size * unit
            return lambda stream: self._joined.allGather(given, target.pointer, each, kind, stream)

        def apart(stream: int) -> None:
            with self._together():
                for block, (first, stop) in enumerate(pairwise(bounds)):
                    if first < stop:
                        own = given if block == self._rank else target.at(first)
                        nbytes = (stop - first) * unit
                        self._joined.broadcast(own, target.at(first), nbytes, kind, block, stream)

        return apart

    def _alltoall(
        self, source: DeviceBuffer, target: DeviceBuffer, kind: int, unit: int, root: int
    ) -> Any:
        each = target.count // self._size

        def exchange(stream: int) -> None:
            # In place, a receive would overwrite a block that is still to be sent.
            given = self._copied(source, stream) if source is target else source
            with self._together():
                for peer in range(self._size):
                    self._joined.send(given.at(peer * each), each * unit, kind, peer, stream)
                    self._joined.recv(target.at(peer * each), each * unit, kind, peer, stream)

        return exchange

    def _copied(self, source: DeviceBuffer, stream: int) -> DeviceBuffer:
        """Copy `source` on the stream: CuPy reuses memory of a stream in the order of its work."""
        with stream_at(self._cupy.cuda, stream, self.device):
            copy = source.empty(source.count)
            copy.copy_from(source)
        return copy

    def free(self) -> None:
        with self._cupy.cuda.Device(self.device):
            self._joined.destroy()
