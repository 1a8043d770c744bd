"""The collectives of mpillm: a communicator, and the operations that its ranks do together.

    communicator = Communicator(comm)
    communicator.allreduce(array)      # in place, by the fastest algorithm known here
    ready = communicator.prepare("allreduce", array)  # checked and chosen once
    ready.run()                        # any number of times
    ready.start(); ...; ready.wait()   # overlapped with other work; test() it to progress

Arrays are C-contiguous NumPy arrays or torch CPU tensors of any shape (buffers.py). On a GPU they
are torch CUDA tensors and CuPy arrays (gpu/), and a call takes its place in the stream that is
current when it begins. NumPy arrays never make comm load torch.

All ranks call the same operations in the same order, with arrays of the same type and count.
`debug` finds a rank that does not, before data moves. An array in node-shared memory (`allocate`)
is reduced fastest; all ranks must then pass the same part of their rows.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm import selection
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import Buffer, as_buffer
from mpillm.comm.channels.sendrecv import sendrecv_request
from mpillm.comm.executors.dispatch import Dispatcher
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.device_buffer import DeviceBuffer, is_on_device
from mpillm.comm.gpu.device_selection import DeviceCollectives
from mpillm.comm.persistent import InFlight, PersistentCollective
from mpillm.comm.selection import CollectiveCall, Profile
from mpillm.comm.shared.team import NOWHERE, PRIVATE, NodeTeam, SharedRows
from mpillm.errors import CommError
from mpillm.machine.node_map import NodeMap, map_nodes

if TYPE_CHECKING:
    from mpi4py import MPI

# Every MPI offers at least 2¹⁵ tags. Two runs share a tag only when 2¹⁴ others began between them.
FIRST_TAG, TAGS = 1024, 1 << 14
# Facts that ranks must agree on: `debug` compares them.
FACTS = (
    "operation",
    "type",
    "count",
    "op",
    "root",
    "algorithm",
    "fixed_order",
    "place in node-shared memory",
    "out's place in node-shared memory",
)


def silent(text: str) -> None:
    """Drop a warning, where nobody listens."""


class Communicator:
    """The ranks of `comm`, which is duplicated, with our collectives. Every rank makes it, with the
    same arguments.

    `profile`: the cluster's, which chooses algorithms. `debug`: compare the ranks' calls before
    data moves. `warn` is called on one rank a node, with what is missing. `node_map`: of `comm`;
    without it MPI is asked.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        *,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
        node_map: NodeMap | None = None,
    ) -> None:
        from mpi4py import MPI

        self.comm: MPI.Intracomm = comm.Dup()
        self.rank, self.size = comm.rank, comm.size
        self.profile, self.debug, self._warn = profile, debug, warn
        node_map = node_map or map_nodes(self.comm)
        self._node_comm = node_map.split(self.comm)
        team = NodeTeam.create(self._node_comm, warn) if self.size > 1 else None
        # Every node or none: a rank must know the memory of the others to choose as they do.
        shares = bool(self.comm.allreduce(team is not None, MPI.LAND))
        self._team = team if shares else None
        self.node_map = NodeMap(node_map.nodes, shares, node_map.library)
        self._across = self._join_across() if self.node_map.two_level else None
        self.in_flight = InFlight()
        tags = itertools.cycle(range(FIRST_TAG, FIRST_TAG + TAGS))
        self._dispatcher = Dispatcher(
            self.comm, self._team, self._across, self.node_map, tags.__next__
        )
        self._calls = itertools.count(1)
        self._gpus: DeviceCollectives | None = None

    def _join_across(self) -> "MPI.Intracomm | None":
        """Join the ranks of equal local rank on all nodes; where nodes are uneven, their first
        ranks alone.
        """
        from mpi4py import MPI

        local = self.node_map.local_rank(self.rank)
        color = local if self.node_map.even else 0 if local == 0 else MPI.UNDEFINED
        across = self.comm.Split(color, self.rank)
        return None if across == MPI.COMM_NULL else across  # type: ignore[return-value]

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node."""
        return [list(ranks) for ranks in self.node_map.nodes]

    def algorithms(self, operation: str, like: Any = None) -> tuple[str, ...]:
        """Return the algorithms that can run `operation` here, `auto` first.

        `like`: an array on a GPU, for the algorithms of such arrays; then every rank calls it.
        """
        selection.check_known(operation, selection.OPERATIONS, "operation")
        if operation != "barrier" and is_on_device(like):
            return self._on_gpus().algorithms(operation, like)
        return selection.available(operation, self.node_map)

    def allocate(self, count: int, element: str, instead: str = PRIVATE) -> SharedRows | None:
        """Allocate node-shared memory for `count` elements of type `element` a rank.

        None on every rank where some node has no room, with a warning of what is done `instead`.
        Every rank calls it; `free` it when no view is used any more.
        """
        from mpi4py import MPI

        if self._team is None:
            return None
        rows = self._team.allocate(count, element, self._warn, instead)
        if self.comm.allreduce(rows is not None, MPI.LAND):
            return rows
        if rows is not None:
            rows.free()
        return None

    # ---- collectives ----

    def allreduce(self, array: Any, out: Any = None, **options: Any) -> None:
        """Reduce over all ranks: the result on every rank, in `array` or in `out` of the same
        count.

        `op`: sum, mean (floats only), max, min. `algorithm`: one of `algorithms("allreduce")`, or a
        plug-in's `package.module:Name`. `fixed_order`: sum in the one tree that depends on the
        ranks' numbers alone, the same bits by every algorithm that can.
        """
        self.prepare("allreduce", array, out, **options).run()

    def reduce_scatter(self, array: Any, out: Any = None, **options: Any) -> None:
        """Reduce-scatter: this rank's block, of `block_bounds(count, size)`, is the result.

        It is in its place in `array`, whose other blocks are left with partial sums, or in `out` of
        the block's count.
        """
        self.prepare("reduce_scatter", array, out, **options).run()

    def allgather(self, array: Any, out: Any = None, **options: Any) -> None:
        """Gather every rank's block into `array`; or into `out`, where each `array` is the block
        itself.
        """
        self.prepare("allgather", array, out, **options).run()

    def broadcast(self, array: Any, root: int = 0, **options: Any) -> None:
        """Broadcast: overwrite `array` by that of rank `root`."""
        self.prepare("broadcast", array, root=root, **options).run()

    def reduce(self, array: Any, out: Any = None, root: int = 0, **options: Any) -> None:
        """Reduce to rank `root` alone, in its `array` or `out`; others keep their arrays."""
        self.prepare("reduce", array, out, root=root, **options).run()

    def alltoall(self, array: Any, out: Any = None, **options: Any) -> None:
        """Exchange blocks: block i of `array` goes to rank i, where blocks are in the order of
        senders.

        The number of ranks must divide the count.
        """
        self.prepare("alltoall", array, out, **options).run()

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.prepare("barrier").run()

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
    ) -> "PersistentCollective":
        """Check a collective and choose its algorithm, once; each run reads and writes the arrays'
        memory.

        Every rank prepares the same, in the same order. Raises CommError for arrays, counts, an
        operation or an algorithm that do not fit.
        """
        call = CollectiveCall(operation, op, root, algorithm, fixed_order)
        if operation != "barrier" and is_on_device(array):
            return self._prepare_on_gpu(call, array, out)
        if operation == "barrier":
            source = target = as_buffer(np.empty(0, np.uint8))
        else:
            source = as_buffer(array, writable=out is None and self._takes(call))
            target = source if out is None else as_buffer(out)
            _check_arrays(call, source, target, self.rank, self.size)
        team = self._team
        # Located once: the choice, the dispatcher and `debug` need it.
        location = NOWHERE if team is None else team.locate(source, target)
        pushes = location.pushes(operation)
        nbytes = max(source.octets.size, target.octets.size)
        chosen = selection.choose(call, source.element, nbytes, self.node_map, pushes, self.profile)
        request = self._dispatcher.build(call, chosen, source, target, location)
        check = self._checking(_facts(call, source, location.offsets))
        return PersistentCollective(self.in_flight, chosen, request, check)

    def _prepare_on_gpu(self, call: CollectiveCall, array: Any, out: Any) -> "PersistentCollective":
        source = as_device_buffer(array, writable=out is None and self._takes(call))
        target = source if out is None else as_device_buffer(out)
        _check_arrays(call, source, target, self.rank, self.size)
        chosen, request = self._on_gpus().prepare(call, source, target)
        check = self._checking(_facts(call, source, (None, None)))
        return PersistentCollective(
            self.in_flight, chosen, request, check, request.mark, request.enqueued
        )

    def _on_gpus(self) -> DeviceCollectives:
        if self._gpus is None:
            # Making communicators, ranks wait for each other without progress of the calls in
            # flight.
            self.wait_all()
            host = Communicator(self.comm, profile=self.profile, node_map=self.node_map)
            self._gpus = DeviceCollectives(host, self.profile, self.wait_all)
        return self._gpus

    def _takes(self, call: CollectiveCall) -> bool:
        """Return whether an operation in place writes into this rank's array."""
        rooted = {"broadcast": self.rank != call.root, "reduce": self.rank == call.root}
        return rooted.get(call.operation, True)

    # ---- point to point ----

    def send(self, array: Any, to: int, tag: int = 0) -> None:
        """Send `array` to rank `to`, which receives an array of the same type and count under the
        same tag.
        """
        self.prepare_exchange(array, to, tag=tag).run()

    def receive(self, array: Any, source: int, tag: int = 0) -> None:
        """Fill `array` with the message of rank `source`."""
        self.prepare_exchange(out=array, source=source, tag=tag).run()

    def exchange(self, array: Any, to: int, out: Any, source: int, tag: int = 0) -> None:
        """Send `array` to rank `to` and receive `out` from rank `source`, at once: a ring of calls
        cannot deadlock.
        """
        self.prepare_exchange(array, to, out, source, tag=tag).run()

    def prepare_exchange(
        self,
        array: Any = None,
        to: int | None = None,
        out: Any = None,
        source: int | None = None,
        *,
        tag: int = 0,
    ) -> "PersistentCollective":
        """Prepare a send (`array`, `to`), a receive (`out`, `source`) or both, to run any number of
        times.

        Only the ranks that take part prepare it. `tag` is below 1,024; higher ones are the
        collectives'.
        """
        if not 0 <= tag < FIRST_TAG:
            raise CommError(f"tag {tag} is out of range; take one from 0 to {FIRST_TAG - 1}")
        given = None if array is None else as_buffer(array, writable=False)
        taken = None if out is None else as_buffer(out)
        for what, buffer, peer in (("array", given, to), ("out", taken, source)):
            if (buffer is None) != (peer is None) or (
                peer is not None and not 0 <= peer < self.size
            ):
                raise CommError(
                    f"an exchange needs {what} and its rank from 0 to {self.size - 1}, "
                    f"not rank {peer}"
                )
        request = sendrecv_request(self.comm, given, to, taken, source, tag)
        return PersistentCollective(self.in_flight, "mpi", request)

    def _checking(self, facts: tuple[Any, ...]) -> Callable[[], None] | None:
        """Return the check of a call's facts at each start, with `debug` only."""
        return functools.partial(self._check_call, facts) if self.debug else None

    def _check_call(self, facts: tuple[Any, ...]) -> None:
        """Raise CommError on every rank unless all are about to make the same call."""
        number = next(self._calls)
        everywhere = self.comm.allgather((number, *facts))
        names = ("call", *FACTS)
        for rank, theirs in enumerate(everywhere):
            differing = [
                f"{name} {one!r} on rank 0 and {other!r} on rank {rank}"
                for name, one, other in zip(names, everywhere[0], theirs, strict=True)
                if one != other
            ]
            if differing:
                raise CommError(
                    f"collective call {number}: all ranks must make the same call, but there is "
                    f"{'; '.join(differing)}"
                )

    def progress(self) -> None:
        """Progress all calls in flight, without waiting."""
        self.in_flight.progress()

    def wait_all(self) -> None:
        """Return when no call is in flight; backs off between polls."""
        self.in_flight.wait_all()

    def free(self) -> None:
        """Free communicators and shared memory; every rank calls it, and uses no prepared call
        afterwards.
        """
        self.wait_all()
        if self._gpus is not None:
            self._gpus.free()
        for comm in (self._across, self._node_comm, self.comm):
            if comm is not None:
                comm.Free()


def _facts(
    call: CollectiveCall, source: Buffer | DeviceBuffer, places: tuple[int | None, int | None]
) -> tuple[Any, ...]:
    """Return the values of FACTS."""
    wanted = (call.op, call.root, call.algorithm, call.fixed_order)
    return (call.operation, source.element, source.count, *wanted, *places)


def _check_arrays(
    call: CollectiveCall,
    source: Buffer | DeviceBuffer,
    target: Buffer | DeviceBuffer,
    rank: int,
    size: int,
) -> None:
    """Raise CommError unless the arrays fit each other and the operation."""
    if source.element != target.element:
        raise CommError(
            f"array holds {source.element} and out holds {target.element}; both must be of one type"
        )
    if not 0 <= call.root < size:
        raise CommError(f"root {call.root} must be a rank from 0 to {size - 1}")
    if call.operation == "alltoall" and source.count % size:
        raise CommError(
            f"alltoall needs a block of equal length for each of {size} ranks; "
            f"{source.count} elements are not divisible"
        )
    if call.operation == "broadcast" and source is not target:
        raise CommError("broadcast is in place: do not pass out")
    if source is target or (call.operation == "reduce" and rank != call.root):
        return
    wanted = source.count
    if call.operation in ("reduce_scatter", "allgather"):
        whole = source.count if call.operation == "reduce_scatter" else target.count
        first, stop = block_bounds(whole, size)[rank : rank + 2]
        block, given = (target, "out") if call.operation == "reduce_scatter" else (source, "array")
        if block.count != stop - first:
            raise CommError(
                f"{call.operation} of {whole} elements gives rank {rank} of {size} a block of "
                f"{stop - first}; {given} holds {block.count}"
            )
    elif target.count != wanted:
        raise CommError(
            f"{call.operation} of {wanted} elements needs an out of as many; "
            f"it holds {target.count}"
        )
