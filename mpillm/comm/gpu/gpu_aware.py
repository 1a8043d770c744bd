"""Collectives by device pointers handed to MPI, for libraries that a probe (probe.py) has shown to take them.

The library's own collective where the probe ran it, blocking and not; else, and for 16-bit floats, which no library
sums on a GPU, a list algorithm whose messages are the library's and whose sums are CuPy's, on the GPU.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from mpillm.comm.algorithms.catalog import ALGORITHMS, schedule
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import SHORT_FLOATS, Buffer
from mpillm.comm.executors import mpi_library
from mpillm.comm.executors.blockwise import make_steps
from mpillm.comm.executors.request import LocalRequest, Request, ScheduleRequest, chain
from mpillm.comm.executors.segmented import IN_FLIGHT, Scratch
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.selection import KIB, MIB, REDUCING, CollectiveCall

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGES = "messages"
"""In a probe's answer: sends and receives. Other keys are operations; and ARITHMETIC."""
ARITHMETIC = "arithmetic"
SEGMENT_BYTES = MIB
FEW_ROUNDS_BYTES = 256 * KIB
FEW_ROUNDS = ("recursive-doubling", "recursive-halving", "binomial", "pairwise")
FEW_BYTES = ("ring", "rabenseifner", "scatter-allgather", "pairwise")
# A list runs under one tag: at most one is under way at a time in the communicator that is its own.
TAG = 1


def way(operation: str, element: str, probe: Mapping[str, Any]) -> str:
    """How MPI does it on device pointers: by "library" or "list"; "" where `probe` allows neither."""
    takes = bool(probe.get(operation))
    if operation in REDUCING:
        # Open MPI's non-blocking sums touch device memory on the CPU, and a probe of one process need not sum at all.
        takes = takes and bool(probe.get(ARITHMETIC)) and element not in SHORT_FLOATS
    if takes:
        return "library"
    return "list" if probe.get(MESSAGES) else ""


def list_for(operation: str, nbytes: int) -> str:
    """The list algorithm: few rounds for small arrays, few bytes for large ones."""
    wanted = FEW_ROUNDS if nbytes < FEW_ROUNDS_BYTES else FEW_BYTES
    return next(name for name in wanted if name in ALGORITHMS[operation])


class DeviceMessages:
    """Builds such collectives over `comm`, in which only one is under way at a time, in one order on all ranks.

    `copying(work)`: `work`, which copies within the GPU, as a call that gives it to the caller's stream. `reached`: a
    stage that waits for that stream. `apart(stage)`: the stage with a stream of its own, on which it sums.
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
        self, wish: CollectiveCall, kind: str, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        """The stages of `wish` by `kind`, see `way`; `source` is `target` where it works in place. A mean is left a
        sum.
        """
        op = "sum" if wish.op == "mean" else wish.op
        make = self._by_library if kind == "library" else self._by_list
        return make(wish.operation, op, wish.root, source, target)

    def _copy(self, source: DeviceBuffer, target: DeviceBuffer) -> Request:
        return LocalRequest(self._copying(functools.partial(target.copy_from, source)))

    def _own(self, whole: DeviceBuffer) -> DeviceBuffer:
        bounds = block_bounds(whole.count, self._comm.size)
        return whole.part(bounds[self._comm.rank], bounds[self._comm.rank + 1])

    def _by_library(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        behind = []
        if operation == "reduce_scatter" and source is target:
            # mpi_library.py would copy on the CPU what MPI puts at the array's beginning.
            own = self._own(source)
            target = own.empty(own.count)
            behind = [self._copy(target, own)]
        call = mpi_library.stage(self._comm, operation, _seen(source), _seen(target), op, root)
        return chain(self._reached(), call, *behind)

    def _by_list(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        """A list works in one array, in place; what is to be kept or goes elsewhere is copied before and behind."""
        given, whole = target, target
        before: list[Request] = []
        behind: list[Request] = []
        if operation == "alltoall":
            given = source.empty(source.count) if source is target else source
            own = (self._own(source), self._own(target))
            before = [self._copy(source, given) if source is target else self._copy(*own)]
        elif (operation == "reduce_scatter" and source is not target) or (
            operation == "reduce" and self._comm.rank != root
        ):
            given = whole = source.empty(source.count)
            before = [self._copy(source, whole)]
            behind = [self._copy(self._own(whole), target)] if operation == "reduce_scatter" else []
        elif operation == "allgather" and source is not target:
            before = [self._copy(source, self._own(target))]
        elif source is not target:
            before = [self._copy(source, target)]
        return chain(
            *before,
            self._reached(),
            self._apart(self._listed(operation, op, root, given, whole)),
            *behind,
        )

    def _listed(
        self, operation: str, op: str, root: int, source: DeviceBuffer, target: DeviceBuffer
    ) -> Request:
        algorithm = list_for(operation, target.nbytes)
        plan = schedule(operation, algorithm, self._comm.rank, self._comm.size, root)
        given, taken = _seen(source), _seen(target)
        if source is target:
            given = taken
        # CuPy keeps freed memory itself.
        scratch = Scratch(kept_bytes=0)
        steps = make_steps(plan, self._comm, given, taken, op, SEGMENT_BYTES, IN_FLIGHT, scratch)
        return ScheduleRequest(steps, lambda: TAG)


def _seen(buffer: DeviceBuffer) -> Buffer:
    """To messages and their interpreter a DeviceBuffer is a Buffer: it has the same words."""
    return cast(Buffer, buffer)
