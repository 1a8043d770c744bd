"""The GPU side of a group: which way for an array on a GPU, and the stages of it.

- nccl: the GPUs among themselves (nccl.py).
- device-mpi: device pointers handed to an MPI library that takes them (gpu_aware.py).
- staged: pinned host memory in segments, and between the hosts the best algorithm of the CPU (staging.py). The name of
  an algorithm of the CPU means the same by that algorithm.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mpillm.comm.buffers import FLOATS
from mpillm.comm.executors.request import LocalRequest, Request
from mpillm.comm.gpu import gpu_aware, nccl
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.device_buffer import DeviceBuffer
from mpillm.comm.gpu.device_dispatch import DeviceBuilder, HostGroup, whole_of
from mpillm.comm.gpu.streams import Caller, Ordered
from mpillm.comm.selection import REDUCING, CollectiveCall, Profile, check_known
from mpillm.errors import CommError

WAYS = ("nccl", "device-mpi", "staged")
UNPROBED = (
    "no probe has shown that this MPI takes memory of a GPU; make a profile with "
    "`mpirun … mpillm bench all --device cuda --save PROFILE.json`"
)


class Gpus:
    """Every rank makes it, at the first call that has an array on a GPU; `host` becomes its own, and is freed with it.

    Calls of it are under way one at a time, in one order on all ranks: the group queues them. `settle` waits for all
    that is under way; it is called before ranks must wait for each other.
    """

    def __init__(
        self, host: HostGroup, profile: Profile | None, settle: Callable[[], None]
    ) -> None:
        self._host, self._profile, self._settle = host, profile, settle
        self._probe: Mapping[str, Any] = getattr(profile, "gpu_probe", {}).get("mpi", {})
        self._builder = DeviceBuilder(host)
        self._nccl: nccl.Nccl | str | None = None

    def algorithms(self, operation: str, like: Any) -> tuple[str, ...]:
        """The ways in which `operation` can be done here on arrays like `like`, `auto` first. Every rank calls it."""
        buffer = as_device_buffer(like, writable=False)
        able = self._able(CollectiveCall(operation), buffer)
        return ("auto", *(name for name, reason in able.items() if not reason))

    def prepare(
        self, wish: CollectiveCall, source: DeviceBuffer, target: DeviceBuffer
    ) -> tuple[str, Ordered]:
        """What was chosen, and its stage; `source` is `target` where it works in place. The arrays fit the wish.

        Raises CommError for a way that cannot be taken here, or that does not exist.
        """
        if source.device != target.device:
            raise CommError(
                f"array lies on GPU {source.device} and out on GPU {target.device}; both must be on one GPU"
            )
        chosen = self._choose(wish, source, whole_of(wish, source, target).nbytes)
        caller = Caller(source)
        return chosen, Ordered(caller, self._stage(wish, chosen, caller, source, target))

    def _stage(
        self,
        wish: CollectiveCall,
        chosen: str,
        caller: Caller,
        source: DeviceBuffer,
        target: DeviceBuffer,
    ) -> Request:
        arrays = (wish, caller, source, target)
        if whole_of(wish, source, target).count == 0:
            return LocalRequest(lambda: None)
        if self._host.size == 1:
            return self._builder.alone(caller, source, target)
        if chosen == "nccl" and isinstance(self._nccl, nccl.Nccl):
            return self._builder.by_nccl(self._nccl, *arrays)
        if chosen == "device-mpi":
            return self._builder.by_pointers(
                gpu_aware.way(wish.operation, source.element, self._probe), *arrays
            )
        return self._builder.by_host("auto" if chosen == "staged" else chosen, *arrays)

    def _able(self, wish: CollectiveCall, buffer: DeviceBuffer) -> dict[str, str]:
        """Way → why it can't be taken; "" where it can."""
        others = [name for name in self._host.algorithms(wish.operation) if name != "auto"]
        able = dict.fromkeys(WAYS, "") | dict.fromkeys(others, "")
        ordered = wish.fixed_order and wish.operation in REDUCING
        if self._host.size == 1:
            return able | dict.fromkeys(WAYS[:2], "there is no other rank")
        if ordered:
            return able | dict.fromkeys(WAYS[:2], "it cannot keep the fixed order of a sum")
        if wish.algorithm in ("auto", "nccl"):
            able["nccl"] = self._joined(buffer)
            if isinstance(self._nccl, nccl.Nccl):
                able["nccl"] = self._nccl.lacks(wish.operation, buffer.element, buffer.device)
        if not gpu_aware.way(wish.operation, buffer.element, self._probe):
            able["device-mpi"] = (
                UNPROBED if not self._probe else "the probe in the profile found that it fails"
            )
        return able

    def _joined(self, buffer: DeviceBuffer) -> str:
        """Join NCCL, once; why that failed, the same on every rank, or ""."""
        if self._nccl is None:
            self._settle()
            nodes = self._host.layout.nodes
            own = next(node for node, ranks in enumerate(nodes) if self._host.rank in ranks)
            self._nccl = nccl.join(self._host.comm, own, buffer.device)
        return self._nccl if isinstance(self._nccl, str) else ""

    def _choose(self, wish: CollectiveCall, buffer: DeviceBuffer, nbytes: int) -> str:
        if wish.op == "mean" and buffer.element not in FLOATS:
            raise CommError(
                f"a mean of {buffer.element} is no {buffer.element}; reduce by sum, or convert to a float type"
            )
        able = self._able(wish, buffer)
        can = [name for name, reason in able.items() if not reason]
        check_known(wish.algorithm, ("auto", *able), f"algorithm for {wish.operation} on a GPU")
        if wish.algorithm != "auto":
            if able[wish.algorithm]:
                raise CommError(
                    f"{wish.operation} of {buffer.element} on a GPU by {wish.algorithm}: {able[wish.algorithm]}; take "
                    f"one of {', '.join(can)}"
                )
            return wish.algorithm
        layout, known = self._host.layout, None
        if self._profile is not None and not wish.fixed_order:
            allowed = [name for name in can if name != "reference"]
            known = self._profile.best(
                wish.operation,
                nbytes,
                buffer.element,
                len(layout.nodes),
                layout.size,
                allowed,
                device="cuda",
            )
        return known or can[0]

    def free(self) -> None:
        """Every rank calls it."""
        self._builder.free()
        if isinstance(self._nccl, nccl.Nccl):
            self._nccl.free()
        self._host.free()
