"""Collectives by device pointers in MPI calls, for libraries that pass the probe (probe.py).

The library's own collective where the probe ran it, blocking and not. Else a list algorithm, whose
messages are the library's and whose sums are CuPy's, on the GPU. 16-bit floats always take a list:
no MPI library sums them on a GPU.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from mpillm.comm.algorithms.algorithm_catalog import algorithms_of, schedule
from mpillm.comm.algorithms.schedule import REDUCING, block_bounds
from mpillm.comm.buffers import SHORT_FLOATS, Buffer
from mpillm.comm.executors.blockwise import make_executor
from mpillm.comm.executors.mpi_library import mpi_request
from mpillm.comm.executors.request import LocalRequest, Operands, Request, chain
from mpillm.comm.executors.segmented import Scratch, Segmentation
from mpillm.comm.gpu.device_buffer import DeviceBuffer, DeviceBytes
from mpillm.comm.selection import KIB, MIB, CollectiveCall

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGES = "messages"
"""Key of sends and receives in a probe's answers; other keys are operations, and ARITHMETIC."""
ARITHMETIC = "arithmetic"
# Above every eager limit, short enough that sums overlap with messages.
SEGMENTS = Segmentation(MIB)
# Below this, latency of the rounds is most of the time. Not measured on a GPU yet.
FEW_ROUNDS_BYTES = 256 * KIB
FEW_ROUNDS = ("recursive-doubling", "recursive-halving", "binomial", "pairwise")
FEW_BYTES = ("ring", "rabenseifner", "scatter-allgather", "pairwise")
# One tag is enough: at most one list is in flight at a time, in a communicator of its own.
TAG = 1


def way(operation: str, element: str, probe: Mapping[str, Any]) -> str:
    """Choose "library" or "list" for device pointers; "" where `probe` allows neither."""
    takes = bool(probe.get(operation))
    if operation in REDUCING:
        # Open MPI's non-blocking sums read device memory on the CPU. A probe of one process may
        # succeed without any sum, so local arithmetic is probed apart.
        takes = takes and bool(probe.get(ARITHMETIC)) and element not in SHORT_FLOATS
    if takes:
        return "library"
    return "list" if probe.get(MESSAGES) else ""


def schedule_for(operation: str, nbytes: int) -> str:
    """Choose the scheduled algorithm: few rounds for small arrays, few bytes for large ones."""
    wanted = FEW_ROUNDS if nbytes < FEW_ROUNDS_BYTES else FEW_BYTES
    return next(name for name in wanted if name in algorithms_of(operation))


class DeviceMessages:
    """Builds such collectives over `comm`; one is in flight at a time, in one order on all ranks.

    `copying(work)` wraps copies within the GPU so that they are enqueued in the caller's stream.
    `reached()` makes a request that waits for that stream. `apart(request)` gives a request a
    stream of its own, on which it sums.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        copying: Callable[[Callable[[], object]], Callable[[], object]],
        reached: Callable[[], Request],
        apart: Callable[[Request], Request],
    ) -> None:
        self._comm, self._copying, self._reached, self._apart = comm, copying, reached, apart

    def build(
        self, call: CollectiveCall, kind: str, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        """Build the request of `call` by `kind`, see `way`; `source` is `target` in place.

        A mean is left a sum: the caller scales it.
        """
        op = "sum" if call.op == "mean" else call.op
        make = self._by_library if kind == "library" else self._by_schedule
        return make(call.operation, op, call.root, source, target)

    def _copy(self, source: DeviceBuffer, target: DeviceBuffer) -> Request:
        return LocalRequest(self._copying(functools.partial(target.copy_from, source)))

    def _own(self, whole: DeviceBuffer) -> DeviceBuffer:
        bounds = block_bounds(whole.count, self._comm.size)
        return whole.part(bounds[self._comm.rank], bounds[self._comm.rank + 1])

    def _by_library(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        after = []
        if operation == "reduce_scatter" and source is target:
            # MPI puts the block at the array's start; mpi_library.py would move it on the CPU.
            own = self._own(source)
            target = own.empty(own.count)
            after = [self._copy(target, own)]
        library = mpi_request(self._comm, operation, _operands(source, target, op, root))
        return chain(self._reached(), library, *after)

    def _by_schedule(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        """Run a schedule in place, with copies before and after for separate arrays."""
        given, whole = target, target
        before: list[Request] = []
        after: list[Request] = []
        if operation == "alltoall":
            given = source.empty(source.count) if source is target else source
            own = (self._own(source), self._own(target))
            before = [self._copy(source, given) if source is target else self._copy(*own)]
        elif (operation == "reduce_scatter" and source is not target) or (
            operation == "reduce" and self._comm.rank != root
        ):
            given = whole = source.empty(source.count)
            before = [self._copy(source, whole)]
            after = [self._copy(self._own(whole), target)] if operation == "reduce_scatter" else []
        elif operation == "allgather" and source is not target:
            before = [self._copy(source, self._own(target))]
        elif source is not target:
            before = [self._copy(source, target)]
        return chain(
            *before,
            self._reached(),
            self._apart(self._scheduled(operation, op, root, given, whole)),
            *after,
        )

    def _scheduled(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        algorithm = schedule_for(operation, target.nbytes)
        plan = schedule(operation, algorithm, self._comm.rank, self._comm.size, root)
        operands = _operands(source, target, op, root)

        def allocate(nbytes: int) -> DeviceBytes:
            return target.empty(nbytes // target.itemsize).octets

        # CuPy has a memory pool, so scratch memory need not be kept here.
        scratch = Scratch(kept_bytes=0, allocate=allocate)
        return make_executor(plan, self._comm, operands, SEGMENTS, scratch, lambda: TAG)


def _operands(source: DeviceBuffer, target: DeviceBuffer, op: str, root: int) -> Operands:
    """Type DeviceBuffers as Buffers: they have the methods that executors use."""
    return Operands(cast(Buffer, source), cast(Buffer, target), op, root)
