"""Collectives of arrays on GPUs: choose a way and prepare the request.

- nccl: the GPUs among themselves (nccl.py).
- device-mpi: device pointers in calls of a GPU-aware MPI library (gpu_aware.py).
- staged: pinned host memory in segments, between the hosts the best algorithm of the CPU
  (staging.py). The name of an algorithm of the CPU means staged, by that algorithm.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mpillm.comm.algorithms.schedule import REDUCING
from mpillm.comm.buffers import FLOATS
from mpillm.comm.executors.request import LocalRequest, Request
from mpillm.comm.gpu import gpu_aware, nccl
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.gpu.device_dispatch import DeviceDispatcher, whole_of
from mpillm.comm.gpu.streams import CallerStream, OrderedRequest
from mpillm.comm.selection import CollectiveCall, Profile, check_known
from mpillm.errors import CommError
from mpillm.system.plugins import is_plugin

if TYPE_CHECKING:
    from mpillm.comm.communicator import Communicator

WAYS = ("nccl", "device-mpi", "staged")
UNPROBED = (
    "no probe has shown that this MPI takes GPU memory; make a profile with "
    "`mpirun … mpillm bench all --device cuda --save PROFILE.json`"
)


class DeviceCollectives:
    """Collectives on GPUs. Every rank makes it at its first call with an array on a GPU.

    It owns `host`, and frees it. Its calls are in flight one at a time, in one order on all ranks:
    the communicator queues them. `settle` waits for all that is in flight; it is called before
    ranks must wait for each other.
    """

    def __init__(
        self, host: "Communicator", profile: Profile | None, settle: Callable[[], None]
    ) -> None:
        self._host, self._profile, self._settle = host, profile, settle
        self._probe: Mapping[str, Any] = getattr(profile, "gpu_probe", {}).get("mpi", {})
        self._dispatcher = DeviceDispatcher(host)
        self._nccl: nccl.Nccl | str | None = None

    def algorithms(self, operation: str, like: Any) -> tuple[str, ...]:
        """List the ways of `operation` on arrays like `like`, "auto" first. Every rank calls it."""
        buffer = as_device_buffer(like, writable=False)
        able = self._able(CollectiveCall(operation), buffer)
        return ("auto", *(name for name, reason in able.items() if not reason))

    def prepare(
        self, call: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> tuple[str, OrderedRequest]:
        """Choose a way; return its name and request. `source` is `target` for a call in place.

        The arrays fit the call. Raises CommError for a way that does not exist, or does not work
        here.
        """
        if source.device != target.device:
            raise CommError(
                f"array is on GPU {source.device} and out on GPU {target.device}; both must be on "
                "one GPU"
            )
        chosen = self._choose(call, source, whole_of(call, source, target).nbytes)
        caller = CallerStream(source)
        return chosen, OrderedRequest(
            caller, self._request(call, chosen, caller, source, target), queued=chosen != "nccl"
        )

    def _request(
        self,
        call: CollectiveCall,
        chosen: str,
        caller: CallerStream,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        arrays = (call, caller, source, target)
        # Empty arrays have null pointers, which libraries refuse.
        if whole_of(call, source, target).count == 0:
            return LocalRequest(lambda: None)
        if self._host.size == 1:
            return self._dispatcher.alone(caller, source, target)
        if chosen == "nccl" and isinstance(self._nccl, nccl.Nccl):
            return self._dispatcher.by_nccl(self._nccl, *arrays)
        if chosen == "device-mpi":
            return self._dispatcher.by_pointers(
                gpu_aware.way(call.operation, source.element, self._probe), *arrays
            )
        return self._dispatcher.by_host("auto" if chosen == "staged" else chosen, *arrays)

    def _able(self, call: CollectiveCall, buffer: DeviceBuffer) -> dict[str, str]:
        """Map each way to the reason why it does not work here; "" where it works."""
        others = [name for name in self._host.algorithms(call.operation) if name != "auto"]
        # The host checks a plug-in, and replaces two-level on one node.
        if is_plugin(call.algorithm) or call.algorithm == "two-level":
            others.append(call.algorithm)
        able = dict.fromkeys(WAYS, "") | dict.fromkeys(others, "")
        ordered = call.fixed_order and call.operation in REDUCING
        if self._host.size == 1:
            return able | dict.fromkeys(WAYS[:2], "there is no other rank")
        # Neither NCCL nor an MPI library promises the order of its sums.
        if ordered:
            return able | dict.fromkeys(WAYS[:2], "it cannot keep the fixed order of a sum")
        if call.algorithm in ("auto", "nccl"):
            able["nccl"] = self._joined(buffer)
            if isinstance(self._nccl, nccl.Nccl):
                able["nccl"] = self._nccl.lacks(call.operation, buffer.element, buffer.device)
        if not gpu_aware.way(call.operation, buffer.element, self._probe):
            able["device-mpi"] = (
                UNPROBED if not self._probe else "the probe in the profile found that it fails"
            )
        return able

    def _joined(self, buffer: DeviceBuffer) -> str:
        """Join NCCL, once; return why that failed, the same on every rank, or ""."""
        if self._nccl is None:
            # To join is collective and blocks: nothing of this rank's may be in flight meanwhile.
            self._settle()
            nodes = self._host.node_map.nodes
            own = next(node for node, ranks in enumerate(nodes) if self._host.rank in ranks)
            self._nccl = nccl.join(self._host.comm, own, buffer.device)
        return self._nccl if isinstance(self._nccl, str) else ""

    def _choose(self, call: CollectiveCall, buffer: DeviceBuffer, nbytes: int) -> str:
        if call.op == "mean" and buffer.element not in FLOATS:
            raise CommError(
                f"mean needs a floating-point array, got {buffer.element}; use op='sum' or convert"
            )
        able = self._able(call, buffer)
        can = [name for name, reason in able.items() if not reason]
        check_known(call.algorithm, ("auto", *able), f"algorithm for {call.operation} on a GPU")
        if call.algorithm != "auto":
            if able[call.algorithm]:
                raise CommError(
                    f"{call.operation} of {buffer.element} on a GPU by {call.algorithm}: "
                    f"{able[call.algorithm]}; take one of {', '.join(can)}"
                )
            return call.algorithm
        node_map, known = self._host.node_map, None
        if self._profile is not None and not call.fixed_order:
            # The reference is for tests: never chosen by itself.
            allowed = [name for name in can if name != "reference"]
            known = self._profile.best(
                call.operation,
                nbytes,
                buffer.element,
                len(node_map.nodes),
                node_map.size,
                allowed,
                device="cuda",
            )
        # Without a measurement the first possible way of WAYS: fewest copies first.
        return known or can[0]

    def free(self) -> None:
        """Free communicators and pinned memory. Every rank calls it."""
        self._dispatcher.free()
        if isinstance(self._nccl, nccl.Nccl):
            self._nccl.free()
        self._host.free()
