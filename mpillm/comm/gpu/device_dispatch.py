"""Build the requests of calls on GPUs, by the ways that device_selection.py chooses from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpillm.comm.algorithms.schedule import REDUCING, block_bounds
from mpillm.comm.buffers import from_octets
from mpillm.comm.executors.request import Request, chain
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.gpu.gpu_aware import DeviceMessages
from mpillm.comm.gpu.nccl import Nccl
from mpillm.comm.gpu.pinned import SLOTS, CudaCopies, Pinned
from mpillm.comm.gpu.staging import StagedRequest, plan_staging
from mpillm.comm.gpu.streams import (
    CallerStream,
    EnqueuedRequest,
    OwnStreamRequest,
    StreamReachedRequest,
    stream_at,
)
from mpillm.comm.selection import CollectiveCall

if TYPE_CHECKING:
    from mpillm.comm.communicator import Communicator
    from mpillm.comm.persistent import PersistentCollective

# Of int64 and float64: a slot must hold an element of every rank's block.
LARGEST_ELEMENT_BYTES = 8


def whole_of(call: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer) -> DeviceBuffer:
    """Return the array with the whole count, which is the same on every rank."""
    return target if call.operation == "allgather" else source


class DeviceDispatcher:
    """Builds requests on GPUs; `host` is a communicator that nothing else uses."""

    def __init__(self, host: "Communicator") -> None:
        self._host = host
        self._pinned: dict[int, Pinned] = {}
        self._streams: dict[int, Any] = {}

    def alone(self, caller: CallerStream, source: DeviceBuffer, target: DeviceBuffer) -> Request:
        """Build the request of a single rank: a copy, or nothing in place."""

        def work() -> None:
            if source is not target:
                target.copy_from(source)

        return EnqueuedRequest(caller, caller.doing(work))

    def _result(
        self, call: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> DeviceBuffer | None:
        """Return the part of the arrays that holds this rank's sum after a reduction."""
        if call.operation == "reduce" and self._host.rank != call.root:
            return None
        if call.operation == "reduce_scatter" and source is target:
            bounds = block_bounds(target.count, self._host.size)
            return target.part(bounds[self._host.rank], bounds[self._host.rank + 1])
        return target

    def _scaling(
        self, call: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> Callable[[], None] | None:
        """Return the function that scales a sum to a mean; None where there is nothing to scale."""
        result = (
            self._result(call, source, target)
            if call.op == "mean" and call.operation in REDUCING
            else None
        )
        if result is None or result.count == 0:
            return None
        return lambda: result.scale(1 / self._host.size)

    def by_nccl(
        self,
        joined: Nccl,
        call: CollectiveCall,
        caller: CallerStream,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        enqueue_nccl = joined.prepare(call, source, target)
        scaling = self._scaling(call, source, target)
        scaled = None if scaling is None else caller.doing(scaling)

        def enqueue() -> None:
            enqueue_nccl(caller.stream)
            if scaled is not None:
                scaled()

        return EnqueuedRequest(caller, enqueue)

    def by_pointers(
        self,
        kind: str,
        call: CollectiveCall,
        caller: CallerStream,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        cuda, device = source.library.cuda, source.device
        if device not in self._streams:
            with cuda.Device(device):
                self._streams[device] = cuda.Stream(non_blocking=True)
        builder = DeviceMessages(
            self._host.comm,
            caller.doing,
            lambda: StreamReachedRequest(caller),
            lambda request: OwnStreamRequest(cuda, device, self._streams[device], request),
        )
        scaling = self._scaling(call, source, target)
        # Scratch memory is allocated on the caller's stream: CuPy reuses it in that stream's order.
        with cuda.Device(device), stream_at(cuda, source.current_stream(), device):
            request = builder.build(call, kind, source, target)
        # Copies and scaling after the messages are in the caller's stream; a wait in another stream
        # must wait for them, so the last request is an enqueued one, if empty.
        return chain(request, EnqueuedRequest(caller, caller.doing(scaling or _nothing)))

    def by_host(
        self,
        algorithm: str,
        call: CollectiveCall,
        caller: CallerStream,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        host = self._host
        # Pinning memory takes milliseconds, so slots are kept for later calls.
        if source.device not in self._pinned:
            self._pinned[source.device] = Pinned(source.device, host.size * LARGEST_ELEMENT_BYTES)
        pinned = self._pinned[source.device]
        whole = whole_of(call, source, target)
        segments = plan_staging(
            call.operation,
            whole.count,
            host.size,
            host.rank,
            call.root,
            pinned.slot_bytes // source.itemsize,
            in_place=source is target,
        )
        # Segments of one length in one slot share a collective: all but the last few.
        prepared: dict[tuple[int, int], PersistentCollective] = {}
        hosts = []
        for index, segment in enumerate(segments):
            key = (index % SLOTS, segment.count)
            if key not in prepared:
                octets = pinned.memory[index % SLOTS][: segment.count * source.itemsize]
                prepared[key] = host.prepare(
                    call.operation,
                    from_octets(octets, source.element),
                    op=call.op,
                    root=call.root,
                    algorithm=algorithm,
                    fixed_order=call.fixed_order,
                )
            hosts.append(prepared[key])
        return StagedRequest(segments, hosts, CudaCopies(pinned, caller, source, target))

    def free(self) -> None:
        """Free the pinned memory."""
        for pinned in self._pinned.values():
            pinned.free()


def _nothing() -> None:
    pass
