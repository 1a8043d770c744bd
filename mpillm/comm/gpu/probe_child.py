"""The child of probe.py: `python -m mpillm.comm.gpu.probe_child cuda messages allreduce …`.

It runs the trials in turn. Each takes the code path of gpu_aware.py: small and large arrays, in
place and not, blocking and not. With `cpu` for `cuda` the arrays are NumPy's.
"""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.executors import mpi_library
from mpillm.comm.executors.request import LocalRequest, Request
from mpillm.comm.gpu.device_buffer import DeviceBuffer, DeviceBytes
from mpillm.comm.gpu.gpu_aware import ARITHMETIC, MESSAGES, DeviceMessages
from mpillm.comm.gpu.probe import READY, report_trial
from mpillm.comm.selection import CollectiveCall
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

# Elements for each rank: an eager message, and a rendezvous one.
BLOCKS = (64, 1 << 18)


def row_of(flat: Any, library: Any) -> DeviceBuffer:
    """View a float32 array as a DeviceBuffer; `library`: cupy or numpy."""
    interface = getattr(flat, "__cuda_array_interface__", None) or flat.__array_interface__
    return DeviceBuffer(
        "float32", flat, flat.size, int(interface["data"][0]), 0, lambda: 0, library
    )


class GpuTrials:
    """All trials, over `comm`, with arrays of `library`."""

    def __init__(self, comm: "MPI.Intracomm", library: Any) -> None:
        self._comm, self._library = comm, library
        self._build = DeviceMessages(
            comm, lambda work: work, lambda: LocalRequest(self._settle), lambda request: request
        )

    def _settle(self) -> None:
        if self._library.__name__ == "cupy":
            self._library.cuda.get_current_stream().synchronize()

    def _row(self, value: float, count: int) -> DeviceBuffer:
        return row_of(self._library.full(count, value, "float32"), self._library)

    def _is(self, flat: Any, value: float) -> bool:
        self._settle()
        return bool((flat == value).all())

    def run(self, name: str) -> bool:
        """Run trial `name`, one of probe.TRIALS; True for the right result at every size."""
        make: Callable[[int], Iterator[bool]] = {
            MESSAGES: self._messages,
            ARITHMETIC: self._arithmetic,
        }.get(name, lambda count: self._collective(name, count))
        return all(right for block in BLOCKS for right in make(block * self._comm.size))

    def _messages(self, count: int) -> Iterator[bool]:
        comm, own, other = (
            self._comm,
            self._row(self._comm.rank + 1.0, count),
            self._row(0.0, count),
        )
        left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self._settle()  # MPI knows no streams: the arrays must be filled first
        requests = [comm.Irecv(other.octets, left), comm.Isend(own.octets, right)]
        for request in requests:
            request.Wait()
        yield self._is(other.flat, left + 1.0)

    def _arithmetic(self, count: int) -> Iterator[bool]:
        own, other = self._row(3.0, count), self._row(4.0, count)
        kind, op = mpi_library.type_and_op("float32", "sum")
        self._settle()
        op.Reduce_local(_message(own.octets, count, kind), _message(other.octets, count, kind))
        yield self._is(other.flat, 7.0)

    def _collective(self, operation: str, count: int) -> Iterator[bool]:
        size, rank = self._comm.size, self._comm.rank
        first, stop = block_bounds(count, size)[rank : rank + 2]
        for in_place in (True, False) if operation != "broadcast" else (True,):
            for go in (_blocking, _not_blocking):
                whole = self._row(rank + 1.0, count)
                source = whole if in_place or operation != "allgather" else whole.part(first, stop)
                target = source if in_place else self._row(0.0, count)
                if not in_place and operation == "reduce_scatter":
                    target = target.part(first, stop)
                go(self._build.build(CollectiveCall(operation), "library", source, target))
                yield all(
                    self._is(target.flat[start:end], value)
                    for start, end, value in self._expected(operation, count, whole=in_place)
                )

    def _expected(
        self, operation: str, count: int, whole: bool
    ) -> Iterator[tuple[int, int, float]]:
        """Yield (first, stop, value) of the elements that the operation defines on this rank."""
        size, rank = self._comm.size, self._comm.rank
        bounds, total = block_bounds(count, size), size * (size + 1) / 2
        if operation in ("allgather", "alltoall"):
            yield from ((bounds[block], bounds[block + 1], block + 1.0) for block in range(size))
        elif operation == "reduce_scatter":
            yield (
                (bounds[rank], bounds[rank + 1], total)
                if whole
                else (0, bounds[rank + 1] - bounds[rank], total)
            )
        elif operation == "allreduce" or rank == 0:
            yield 0, count, 1.0 if operation == "broadcast" else total
        elif operation == "broadcast":
            yield 0, count, 1.0


def _message(octets: DeviceBytes, count: int, kind: "MPI.Datatype") -> Any:
    return [octets, count, kind]


def _blocking(request: Request) -> None:
    request.run()


def _not_blocking(request: Request) -> None:
    request.start()
    request.wait()


def main(arguments: Sequence[str]) -> None:
    """Run the trials; `arguments`: the device, then the trials' names."""
    # A crash is an answer here, and needs no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    device, *names = arguments
    if device == "cuda":
        import cupy as library
    else:
        import numpy as library
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    trials = GpuTrials(comm, library)
    # Without a GPU the child ends here, before READY.
    library.full(1, 1.0, "float32")
    if comm.rank == 0:
        report_trial(READY, sys.stdout)
    for name in names:
        try:
            well = trials.run(name)
        except (MPI.Exception, MpillmError, RuntimeError, TypeError, ValueError, BufferError):
            well = False
        well = bool(comm.allreduce(well, MPI.LAND))
        if comm.rank == 0:
            report_trial(name, sys.stdout, well)


if __name__ == "__main__":
    main(sys.argv[1:])
