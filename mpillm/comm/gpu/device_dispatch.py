"""How a call on a GPU becomes stages, by each of the ways that gpus.py chooses from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import from_octets
from mpillm.comm.executors.request import Request, chain
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.gpu.gpu_aware import DeviceMessages
from mpillm.comm.gpu.nccl import Nccl
from mpillm.comm.gpu.pinned import SLOTS, CudaCopies, Pinned
from mpillm.comm.gpu.staging import Host, Staged, plan_staging
from mpillm.comm.gpu.streams import Caller, Enqueued, Reached, Within, stream_at
from mpillm.comm.selection import REDUCING, CollectiveCall, NodeMap

if TYPE_CHECKING:
    from mpi4py import MPI

LARGEST_ELEMENT_BYTES = 8


class HostGroup(Protocol):
    """A Group of the same ranks, for the CPU's part, that no one else uses."""

    comm: "MPI.Intracomm"
    rank: int
    size: int
    layout: NodeMap

    def algorithms(self, operation: str) -> tuple[str, ...]: ...
    def prepare(
        self,
        operation: str,
        array: Any = None,
        out: Any = None,
        *,
        op: str = "sum",
        root: int = 0,
        algorithm: str = "auto",
        fixed_order: bool = False,
    ) -> Host: ...
    def free(self) -> None: ...


def whole_of(wish: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer) -> DeviceBuffer:
    """The array that the operation works on: the one whose count all ranks agree in."""
    return target if wish.operation == "allgather" else source


class DeviceBuilder:
    """Builds the stages of one group's calls on GPUs; `host` is a group that no one else uses."""

    def __init__(self, host: HostGroup) -> None:
        self._host = host
        self._pinned: dict[int, Pinned] = {}
        self._streams: dict[int, Any] = {}

    def alone(self, caller: Caller, source: DeviceBuffer, target: DeviceBuffer) -> Request:
        """A group of one rank: the result is the array itself."""

        def work() -> None:
            if source is not target:
                target.copy_from(source)

        return Enqueued(caller, caller.doing(work))

    def _result(
        self, wish: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> DeviceBuffer | None:
        """What of the arrays holds a sum of this rank's behind a reduction."""
        if wish.operation == "reduce" and self._host.rank != wish.root:
            return None
        if wish.operation == "reduce_scatter" and source is target:
            bounds = block_bounds(target.count, self._host.size)
            return target.part(bounds[self._host.rank], bounds[self._host.rank + 1])
        return target

    def _scaling(
        self, wish: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> Callable[[], None] | None:
        """For a mean: what makes it of the sum; None where there is nothing to do."""
        result = (
            self._result(wish, source, target)
            if wish.op == "mean" and wish.operation in REDUCING
            else None
        )
        if result is None or result.count == 0:
            return None
        return lambda: result.scale(1 / self._host.size)

    def by_nccl(
        self,
        joined: Nccl,
        wish: CollectiveCall,
        caller: Caller,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        call, scaling = joined.call(wish, source, target), self._scaling(wish, source, target)
        scaled = None if scaling is None else caller.doing(scaling)

        def enqueue() -> None:
            call(caller.stream)
            if scaled is not None:
                scaled()

        return Enqueued(caller, enqueue)

    def by_pointers(
        self,
        kind: str,
        wish: CollectiveCall,
        caller: Caller,
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
            lambda: Reached(caller),
            lambda stage: Within(cuda, device, self._streams[device], stage),
        )
        scaling = self._scaling(wish, source, target)
        # CuPy hands memory of one stream out again to that stream alone, behind what it still does with it.
        with cuda.Device(device), stream_at(cuda, source.current_stream(), device):
            stage = builder.build(wish, kind, source, target)
        # Copies and scaling behind the messages are the stream's: who waits in another one waits for them.
        return chain(stage, Enqueued(caller, caller.doing(scaling or _nothing)))

    def by_host(
        self,
        algorithm: str,
        wish: CollectiveCall,
        caller: Caller,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        host = self._host
        if source.device not in self._pinned:
            self._pinned[source.device] = Pinned(source.device, host.size * LARGEST_ELEMENT_BYTES)
        pinned = self._pinned[source.device]
        whole = whole_of(wish, source, target)
        segments = plan_staging(
            wish.operation,
            whole.count,
            host.size,
            host.rank,
            wish.root,
            pinned.slot_bytes // source.itemsize,
            in_place=source is target,
        )
        prepared: dict[tuple[int, int], Host] = {}
        hosts = []
        for index, segment in enumerate(segments):
            key = (index % SLOTS, segment.count)
            if key not in prepared:
                octets = pinned.memory[index % SLOTS][: segment.count * source.itemsize]
                prepared[key] = host.prepare(
                    wish.operation,
                    from_octets(octets, source.element),
                    op=wish.op,
                    root=wish.root,
                    algorithm=algorithm,
                    fixed_order=wish.fixed_order,
                )
            hosts.append(prepared[key])
        return Staged(segments, hosts, CudaCopies(pinned, caller, source, target))

    def free(self) -> None:
        """Give the pinned memory back."""
        for pinned in self._pinned.values():
            pinned.free()


def _nothing() -> None:
    pass
