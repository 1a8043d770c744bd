"""The collectives of mpillm: a group of ranks, and what they do together.

    group = Group(comm)
    group.allreduce(array)                          # in place, by the fastest algorithm that is known here
    ready = group.prepare("allreduce", array)       # checked and chosen once, run any number of times
    ready.run()
    handle = ready.start(); ...; handle.wait()      # behind other work; test it now and then, or nothing moves

Arrays are C-contiguous NumPy arrays or torch CPU tensors of any shape (buffers.py); on a GPU, torch CUDA tensors and
CuPy arrays (gpu/), and then a call takes its place in the stream that is current when it begins. All ranks call the
same operations in the same order with arrays of the same type and count; `debug` finds a rank that doesn't, before data
moves. An array in node-shared memory (`allocate`) is reduced fastest; all ranks must then pass the same part of their
rows.
"""

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm import selection
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import Buffer, as_buffer
from mpillm.comm.channels.sendrecv import sendrecv_request
from mpillm.comm.executors.dispatch import Dispatcher
from mpillm.comm.executors.request import Request
from mpillm.comm.gpu.device_arrays import as_device_buffer
from mpillm.comm.gpu.device_buffer import DeviceBuffer, is_on_device
from mpillm.comm.gpu.device_selection import DeviceCollectives
from mpillm.comm.selection import CollectiveCall, NodeMap, Profile
from mpillm.comm.shared.team import NOWHERE, NodeTeam, SharedRows
from mpillm.comm.waiting import Backoff
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

# Every MPI offers at least 2¹⁵ tags. Two runs meet in a tag only when 2¹⁴ others began between them.
FIRST_TAG, TAGS = 1024, 1 << 14
# What ranks must agree on: what `debug` compares.
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
    """What warnings are told to where nobody listens."""


class Communicator:
    """The ranks of `comm`, which is duplicated. Every rank makes it, with the same arguments.

    `profile`: the cluster's, which chooses the algorithms. `debug`: compare the ranks' calls before data moves. `warn`
    is told, on one rank a node, what had to be done without.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        *,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        from mpi4py import MPI

        self.comm: MPI.Intracomm = comm.Dup()
        self.rank, self.size = comm.rank, comm.size
        self.profile, self.debug, self._warn = profile, debug, warn
        node_comm: MPI.Intracomm = self.comm.Split_type(MPI.COMM_TYPE_SHARED)  # type: ignore[assignment]
        node = NodeTeam.create(node_comm, warn) if self.size > 1 else None
        shares = bool(self.comm.allreduce(node is not None, MPI.LAND))
        self._node = node if shares else None
        first = node_comm.bcast(self.rank)
        places: dict[int, list[int]] = {}
        for rank, leader in enumerate(self.comm.allgather(first)):
            places.setdefault(leader, []).append(rank)
        library = MPI.Get_library_version()
        self.layout = NodeMap(tuple(tuple(ranks) for ranks in places.values()), shares, library)
        self._across = self._join_across(node_comm.rank) if self.layout.two_level else None
        self._node_comm = node_comm
        self._breather = Backoff()
        tags = itertools.cycle(range(FIRST_TAG, FIRST_TAG + TAGS))
        self._builder = Dispatcher(
            self.comm, self._node, self._across, self.layout, tags.__next__, self._breather.moved
        )
        self._calls = itertools.count(1)
        self.under_way: list[Handle] = []
        self._queue: deque[Handle] = deque()
        self._gpus: DeviceCollectives | None = None

    def _join_across(self, place: int) -> "MPI.Intracomm | None":
        """The ranks of the same place on each node; where nodes are uneven, their first ranks alone."""
        from mpi4py import MPI

        color = place if self.layout.even else 0 if place == 0 else MPI.UNDEFINED
        across = self.comm.Split(color, self.rank)
        return None if across == MPI.COMM_NULL else across  # type: ignore[return-value]

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node."""
        return [list(ranks) for ranks in self.layout.nodes]

    def algorithms(self, operation: str, like: Any = None) -> tuple[str, ...]:
        """The algorithms that can run `operation` here, `auto` first; for arrays on a GPU one of them is `like`, and
        every rank calls it.
        """
        selection.check_known(operation, selection.OPERATIONS, "operation")
        if operation != "barrier" and is_on_device(like):
            return self._on_gpus().algorithms(operation, like)
        return selection.available(operation, self.layout)

    def allocate(self, count: int, element: str) -> SharedRows | None:
        """Node-shared memory for `count` elements of type `element` a rank, or None on every rank where some node can't
        give it. Every rank calls it; `free` it when no view is used any more.
        """
        from mpi4py import MPI

        if self._node is None:
            return None
        rows = self._node.allocate(count, element, self._warn)
        if self.comm.allreduce(rows is not None, MPI.LAND):
            return rows
        if rows is not None:
            rows.free()
        return None

    # ---- collectives ----

    def allreduce(self, array: Any, out: Any = None, **wish: Any) -> None:
        """Reduce over all ranks: the result on every rank, in `array` or in `out` of the same count.

        `op`: sum, mean (floats only), max, min. `algorithm`: one of `algorithms("allreduce")`. `fixed_order`: sum in
        the one tree that depends on the ranks' numbers alone, the same bits by every algorithm that can.
        """
        self.prepare("allreduce", array, out, **wish).run()

    def reduce_scatter(self, array: Any, out: Any = None, **wish: Any) -> None:
        """Reduce so that this rank's block, of `block_bounds(count, size)`, is whole: in its place in `array`, whose
        other blocks then hold no one's result, or in `out` of the block's count.
        """
        self.prepare("reduce_scatter", array, out, **wish).run()

    def allgather(self, array: Any, out: Any = None, **wish: Any) -> None:
        """Fill `array` with every rank's own block of it; or `out` with every rank's `array`, which is such a block."""
        self.prepare("allgather", array, out, **wish).run()

    def broadcast(self, array: Any, root: int = 0, **wish: Any) -> None:
        """Overwrite `array` by that of rank `root`."""
        self.prepare("broadcast", array, root=root, **wish).run()

    def reduce(self, array: Any, out: Any = None, root: int = 0, **wish: Any) -> None:
        """Reduce over all ranks: the result on rank `root` alone, in `array` or `out`; others keep their arrays."""
        self.prepare("reduce", array, out, root=root, **wish).run()

    def alltoall(self, array: Any, out: Any = None, **wish: Any) -> None:
        """Block i of `array` goes to rank i, whose blocks are ordered by where they came from. The ranks must divide
        the count.
        """
        self.prepare("alltoall", array, out, **wish).run()

    def barrier(self) -> None:
        """Return when every rank has come here."""
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
        """Check a collective and choose its algorithm, once; the arrays' memory is read and written by each run.

        Every rank prepares the same, in the same order. Raises CommError for arrays, counts, an operation or an
        algorithm that don't fit.
        """
        wish = CollectiveCall(operation, op, root, algorithm, fixed_order)
        if operation != "barrier" and is_on_device(array):
            return self._prepare_on_gpu(wish, array, out)
        if operation == "barrier":
            source = target = as_buffer(np.empty(0, np.uint8))
        else:
            source = as_buffer(array, writable=out is None and self._takes(wish))
            target = source if out is None else as_buffer(out)
            _check_arrays(wish, source, target, self.rank, self.size)
        node = self._node
        # Asked once: the choice, the executor and `debug` need it.
        location = NOWHERE if node is None else node.locate(source, target)
        nbytes = max(source.octets.size, target.octets.size)
        chosen = selection.choose(
            wish, source.element, nbytes, self.layout, location.pushes(operation), self.profile
        )
        stage = self._builder.build(wish, chosen, source, target, location)
        facts = _facts(wish, source, location.offsets)
        return PersistentCollective(
            self,
            chosen,
            stage,
            facts,
            queued=chosen == "two-level",
            segmented=chosen == "segmented-ring",
        )

    def _prepare_on_gpu(self, wish: CollectiveCall, array: Any, out: Any) -> "PersistentCollective":
        source = as_device_buffer(array, writable=out is None and self._takes(wish))
        target = source if out is None else as_device_buffer(out)
        _check_arrays(wish, source, target, self.rank, self.size)
        chosen, stage = self._on_gpus().prepare(wish, source, target)
        facts = _facts(wish, source, (None, None))
        # NCCL keeps its own order, on the stream; the others share memory or a communicator.
        return PersistentCollective(
            self, chosen, stage, facts, queued=chosen != "nccl", mark=stage.mark
        )

    def _on_gpus(self) -> DeviceCollectives:
        if self._gpus is None:
            # To make communicators, ranks wait for each other without moving on what is under way.
            self.settle()
            self._gpus = DeviceCollectives(
                Communicator(self.comm, profile=self.profile), self.profile, self.settle
            )
        return self._gpus

    def _takes(self, wish: CollectiveCall) -> bool:
        """Whether this rank's array is written to by an operation in place."""
        rooted = {"broadcast": self.rank != wish.root, "reduce": self.rank == wish.root}
        return rooted.get(wish.operation, True)

    # ---- point to point ----

    def send(self, array: Any, to: int, tag: int = 0) -> None:
        """Send `array` to rank `to`, which receives an array of the same type and count under the same tag."""
        self.prepare_exchange(array, to, tag=tag).run()

    def receive(self, array: Any, source: int, tag: int = 0) -> None:
        """Fill `array` with what rank `source` sends."""
        self.prepare_exchange(out=array, source=source, tag=tag).run()

    def exchange(self, array: Any, to: int, out: Any, source: int, tag: int = 0) -> None:
        """Send `array` to rank `to` and receive `out` from rank `source`, at once: a ring of calls cannot lock."""
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
        """A send (`array`, `to`), a receive (`out`, `source`) or both, ready to run any number of times. Only the ranks
        that take part prepare it. `tag` is below 1,024.
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
                    f"an exchange needs {what} and its rank from 0 to {self.size - 1}, not rank {peer}"
                )
        return PersistentCollective(
            self,
            "native",
            sendrecv_request(self.comm, given, to, taken, source, tag),
            None,
            queued=False,
        )

    def check_call(self, facts: tuple[Any, ...]) -> None:
        """With `debug`: raise CommError on every rank unless all are about to make the same call."""
        call = next(self._calls)
        everywhere = self.comm.allgather((call, *facts))
        names = ("call", *FACTS)
        for rank, theirs in enumerate(everywhere):
            differing = [
                f"{name} {one!r} on rank 0 and {other!r} on rank {rank}"
                for name, one, other in zip(names, everywhere[0], theirs, strict=True)
                if one != other
            ]
            if differing:
                raise CommError(
                    f"collective call {call}: all ranks must make the same call, but there is {'; '.join(differing)}"
                )

    def begun(self, handle: "Handle", queued: bool) -> None:
        """Note a handle as under way. Operations of several stages share the node's team: those queue up, and each
        begins when the one before it is done, in one order on all ranks.
        """
        self.under_way.append(handle)
        self._breather.moved()
        if queued:
            self._queue.append(handle)
            handle.begin(first=len(self._queue) == 1)

    def ended(self, handle: "Handle") -> None:
        self.under_way.remove(handle)
        self._breather.moved()
        if self._queue and self._queue[0] is handle:
            self._queue.popleft()
            if self._queue:
                self._queue[0].begin(first=True)

    def progress(self) -> None:
        """Move all that is under way on, without waiting."""
        for handle in list(self.under_way):
            handle.test()

    def rest(self) -> None:
        """Between two looks at what is under way."""
        self._breather(told=all(handle.segmented for handle in self.under_way))

    def settle(self) -> None:
        """Return when nothing is under way any more, sleeping where there is long to wait."""
        self.progress()
        while self.under_way:
            self.rest()
            self.progress()

    def free(self) -> None:
        """Give communicators and shared memory back; every rank calls it, and uses no prepared call afterwards."""
        self.settle()
        if self._gpus is not None:
            self._gpus.free()
        for comm in (self._across, self._node_comm, self.comm):
            if comm is not None:
                comm.Free()


class PersistentCollective:
    """One call, ready to run. `algorithm` tells what was chosen. `bare` is `run` for who knows that nothing else is
    under way: a benchmark, where the library's own is to pay for nothing of ours.
    """

    def __init__(
        self,
        group: Communicator,
        algorithm: str,
        stage: Request,
        facts: tuple[Any, ...] | None,
        *,
        queued: bool,
        segmented: bool = False,
        mark: Callable[[], None] | None = None,
    ) -> None:
        self.algorithm = algorithm
        self._group, self.bare, self._stage = group, stage.run, stage
        self._facts, self._queued, self._segmented, self._mark = facts, queued, segmented, mark
        self._handle: Handle | None = None

    def run(self) -> None:
        """Do it, and return when this rank's part is done."""
        if self._group.under_way or self._group.debug:
            # What is under way must go on meanwhile: another rank may wait for that first.
            self.start().wait()
        else:
            self.bare()

    def start(self) -> "Handle":
        """Begin; nothing of the arrays may be touched until the handle is done. One at a time."""
        if self._handle is not None and not self._handle.test():
            raise CommError(
                "a prepared call was started again before it was done; wait for its handle first"
            )
        if self._group.debug and self._facts is not None:
            self._group.check_call(self._facts)
        if self._mark is not None:
            self._mark()
        self._handle = Handle(self._group, self._stage, self._queued, self._segmented)
        return self._handle


class Handle:
    """An operation under way. `done`: whether it was seen to be complete. `segmented`: it tells the group's breather of
    each short message.
    """

    def __init__(self, group: Communicator, stage: Request, queued: bool, segmented: bool) -> None:
        self._group, self._stage, self.segmented = group, stage, segmented
        self._began = self.done = False
        group.begun(self, queued)
        if not queued:
            self.begin(first=True)

    def begin(self, first: bool) -> None:
        """Start, where it is the first of its queue."""
        if first:
            self._began = True
            self._stage.start()

    def test(self) -> bool:
        """Move on without waiting; whether it is done."""
        if not self.done and self._began and self._stage.test():
            self.done = True
            self._group.ended(self)
        return self.done

    def wait(self) -> None:
        """Return when it is done. All else that is under way goes on meanwhile, so ranks may wait in any order."""
        while not self.test():
            if self._group.under_way == [self]:
                self._stage.wait()
            else:
                self._group.rest()
                self._group.progress()


def _facts(
    wish: CollectiveCall, source: Buffer | DeviceBuffer, places: tuple[int | None, int | None]
) -> tuple[Any, ...]:
    """The values of FACTS."""
    wanted = (wish.op, wish.root, wish.algorithm, wish.fixed_order)
    return (wish.operation, source.element, source.count, *wanted, *places)


def _check_arrays(
    wish: CollectiveCall,
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
    if not 0 <= wish.root < size:
        raise CommError(f"root {wish.root} is no rank of this group; take one from 0 to {size - 1}")
    if wish.operation == "alltoall" and source.count % size:
        raise CommError(
            f"alltoall needs a block of equal length for each of {size} ranks; {source.count} elements are not "
            "divisible"
        )
    if wish.operation == "broadcast" and source is not target:
        raise CommError("broadcast works in place; leave out away")
    if source is target or (wish.operation == "reduce" and rank != wish.root):
        return
    wanted = source.count
    if wish.operation in ("reduce_scatter", "allgather"):
        whole = source.count if wish.operation == "reduce_scatter" else target.count
        first, stop = block_bounds(whole, size)[rank : rank + 2]
        block, given = (target, "out") if wish.operation == "reduce_scatter" else (source, "array")
        if block.count != stop - first:
            raise CommError(
                f"{wish.operation} of {whole} elements gives rank {rank} of {size} a block of {stop - first}; {given} "
                f"holds {block.count}"
            )
    elif target.count != wanted:
        raise CommError(
            f"{wish.operation} of {wanted} elements needs an out of as many; it holds {target.count}"
        )
