"""How a call becomes stages: the copies, messages, sums and scalings that make up one collective."""

import functools
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.comm import kernel
from mpillm.comm.algorithms.catalog import schedule
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import SHORT_FLOATS, Buffer, from_octets, new_octets
from mpillm.comm.executors import mpi_library
from mpillm.comm.executors.blockwise import make_steps
from mpillm.comm.executors.hierarchical import HierarchicalPiece, HierarchicalRequest
from mpillm.comm.executors.reference import reference
from mpillm.comm.executors.request import LocalRequest, Request, ScheduleRequest, chain
from mpillm.comm.executors.segmented import Scratch
from mpillm.comm.selection import FEW_ROUNDS_BYTES, KIB, MIB, CollectiveCall, NodeMap
from mpillm.comm.shared.team import Location, NodeTeam

if TYPE_CHECKING:
    from mpi4py import MPI

# Measured in docs/notes.md. Over TCP, Open MPI sends up to 64 KiB without asking; what it asks for first waits behind
# all that is under way, so that a link which is busy both ways stands half empty.
SEGMENT_BYTES = 60 * KIB
IN_FLIGHT = 8
# Within a node, what arrives to be added is summed while it is in the processor's cache. Over TCP, pieces that are
# asked for one by one would leave the link empty between them.
ADDED_BYTES = 512 * KIB
# Two levels: the first piece's sum within the node and the last one's spreading hide behind nothing, so pieces are
# small. But each waits a few times for the node's other ranks, which may look once a millisecond; and no message of a
# ring between nodes is to get shorter than a segment.
PIECE_BYTES, MOST_PIECES = 2 * MIB, 16
TAGS_ACROSS = 1 << 14


class Dispatcher:
    """Builds the stages of one group's collectives. `across` joins the ranks of equal place on all nodes (or, where
    nodes are uneven, each node's first rank; None on the others). `moved`: told where messages of lists are complete.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        node: NodeTeam | None,
        across: "MPI.Intracomm | None",
        layout: NodeMap,
        next_tag: Callable[[], int],
        moved: Callable[[], object],
    ) -> None:
        self._comm, self._node, self._across, self._even = comm, node, across, layout.even
        self._added_bytes = ADDED_BYTES if layout.on_one_node else None
        self._next_tag, self._moved = next_tag, moved
        # Where nodes are uneven not every rank is in `across`, so its runs are counted apart.
        self._next_tag_across = cycle(range(TAGS_ACROSS)).__next__
        self._scratch = Scratch()

    def build(
        self,
        wish: CollectiveCall,
        algorithm: str,
        source: Buffer,
        target: Buffer,
        location: Location | None = None,
    ) -> Request:
        """The stages of `wish` by `algorithm`; `source` is `target` where it works in place."""
        if wish.operation == "barrier":
            if self._node is not None and algorithm == "shared":
                return self._node.prepare("barrier", None, None)
            return mpi_library.barrier(self._comm)
        if self._comm.size == 1:
            return LocalRequest(
                lambda: None if source is target else np.copyto(target.octets, source.octets)
            )
        if algorithm == "shared":
            return self._shared(wish, source, target, location)
        if wish.fixed_order and wish.op in ("sum", "mean") and source.element in SHORT_FLOATS:
            return self._widened(wish, algorithm, source, target)
        stages = [self._summed(wish, algorithm, source, target)]
        if wish.op == "mean" and (wish.operation != "reduce" or self._comm.rank == wish.root):
            result = (
                self._own(target)
                if wish.operation == "reduce_scatter" and source is target
                else target
            )
            stages.append(LocalRequest(functools.partial(result.scale, 1 / self._comm.size)))
        return chain(*stages)

    def _summed(
        self, wish: CollectiveCall, algorithm: str, source: Buffer, target: Buffer
    ) -> Request:
        op = "sum" if wish.op == "mean" else wish.op
        if algorithm == "native":
            return mpi_library.stage(self._comm, wish.operation, source, target, op, wish.root)
        if algorithm == "reference":
            return LocalRequest(functools.partial(reference, self._comm, wish, source, target))
        if algorithm == "two-level":
            return self._two_level(wish, source, target, op)
        return self._by_list(wish.operation, algorithm, source, target, op, wish.root)

    def _shared(
        self, wish: CollectiveCall, source: Buffer, target: Buffer, location: Location | None
    ) -> Request:
        """All ranks are on one node: the team does it, mean and all."""
        assert self._node is not None
        root = self._comm.rank == wish.root
        gives, takes = source, target
        if wish.operation == "broadcast":
            return self._node.prepare(
                "broadcast", gives if root else None, None if root else takes, root=wish.root
            )
        op, scale = ("sum", 1 / self._comm.size) if wish.op == "mean" else (wish.op, 1.0)
        result = None if wish.operation == "reduce" and not root else takes
        return self._node.prepare(wish.operation, gives, result, op, scale, wish.root, location)

    # ---- lists ----

    def _own(self, whole: Buffer) -> Buffer:
        bounds = block_bounds(whole.count, self._comm.size)
        return whole.part(bounds[self._comm.rank], bounds[self._comm.rank + 1])

    def _by_list(
        self, operation: str, algorithm: str, source: Buffer, target: Buffer, op: str, root: int
    ) -> Request:
        """A list works in one array, in place; what is to be kept or goes elsewhere is copied before and behind."""
        if operation == "alltoall":
            return self._exchange_blocks(algorithm, source, target)
        whole, before, behind = target, [], []
        if operation == "reduce_scatter" and source is not target:
            whole = source.empty(source.count)
            before = [_copy(source, whole)]
            behind = [_copy(self._own(whole), target)]
        elif operation == "allgather" and source is not target:
            before = [_copy(source, self._own(target))]
        elif operation == "reduce" and self._comm.rank != root:
            whole = source.empty(source.count)
            before = [_copy(source, whole)]
        elif source is not target:
            before = [_copy(source, target)]
        return chain(
            *before, self._listed(self._comm, operation, algorithm, whole, whole, op, root), *behind
        )

    def _exchange_blocks(self, algorithm: str, source: Buffer, target: Buffer) -> Request:
        given = source.empty(source.count) if source is target else source
        before = (
            [_copy(source, given)]
            if source is target
            else [_copy(self._own(source), self._own(target))]
        )
        return chain(
            *before, self._listed(self._comm, "alltoall", algorithm, given, target, "sum", 0)
        )

    def _listed(
        self,
        comm: "MPI.Intracomm",
        operation: str,
        algorithm: str,
        source: Buffer,
        target: Buffer,
        op: str,
        root: int,
    ) -> Request:
        segmented = algorithm == "segmented-ring"
        plan = schedule(operation, "ring" if segmented else algorithm, comm.rank, comm.size, root)
        segment = SEGMENT_BYTES if segmented else None
        next_tag = self._next_tag_across if comm is self._across else self._next_tag
        steps = make_steps(
            plan,
            comm,
            source,
            target,
            op,
            segment,
            IN_FLIGHT,
            self._scratch,
            self._moved,
            self._added_bytes,
        )
        return ScheduleRequest(steps, next_tag)

    # ---- two levels ----

    def _two_level(self, wish: CollectiveCall, source: Buffer, target: Buffer, op: str) -> Request:
        """Sum within each node, then between nodes, then spread within: each byte crosses the network once a node.

        Where the nodes are even, each rank takes a stripe across; else each node's first rank takes the whole.
        """
        assert self._node is not None
        before = [] if source is target else [_copy(source, target)]
        algorithm = _between(
            wish, target.octets.size // (self._node.comm.size if self._even else 1)
        )
        bounds = block_bounds(target.count, _pieces(target.octets.size, self._comm.size))
        pieces = [
            self._piece(target.part(first, stop), op, algorithm) for first, stop in pairwise(bounds)
        ]
        return chain(*before, HierarchicalRequest(pieces))

    def _piece(self, array: Buffer, op: str, algorithm: str) -> HierarchicalPiece:
        assert self._node is not None
        team = self._node.comm
        if self._even:
            bounds = block_bounds(array.count, team.size)
            stripe = array.part(bounds[team.rank], bounds[team.rank + 1])
            summed = self._node.prepare("reduce_scatter", array, array, op)
            spread = self._node.prepare("allgather", array, array)
        else:
            stripe, leads = array, team.rank == 0
            summed = self._node.prepare("reduce", array, array if leads else None, op)
            spread = self._node.prepare(
                "broadcast", array if leads else None, None if leads else array
            )
        crossed: Request = LocalRequest(lambda: None)
        if self._across is not None:
            crossed = self._listed(self._across, "allreduce", algorithm, stripe, stripe, op, 0)
        return HierarchicalPiece(summed, crossed, spread)

    # ---- fixed order of 16-bit floats ----

    def _widened(
        self, wish: CollectiveCall, algorithm: str, source: Buffer, target: Buffer
    ) -> Request:
        """The sum in float32 from end to end, rounded once: what the node's team gives, at twice the bytes."""
        wide_source = _float32(source.count)
        wide_target = wide_source if source is target else _float32(target.count)
        inner = self.build(wish, algorithm, wide_source, wide_target)
        takes = wish.operation != "reduce" or self._comm.rank == wish.root
        narrow = LocalRequest(
            lambda: kernel.narrow(target.code, target.octets, wide_target.octets) if takes else None
        )
        return chain(
            LocalRequest(lambda: kernel.widen(source.code, wide_source.octets, source.octets)),
            inner,
            narrow,
        )


def _between(wish: CollectiveCall, nbytes: int) -> str:
    if nbytes < FEW_ROUNDS_BYTES:
        return "recursive-doubling"
    return "rabenseifner" if wish.fixed_order else "segmented-ring"


def _pieces(nbytes: int, ranks: int) -> int:
    """How many pieces `two-level` cuts an array into."""
    return max(1, min(MOST_PIECES, nbytes // max(PIECE_BYTES, ranks * SEGMENT_BYTES)))


def _float32(count: int) -> Buffer:
    return from_octets(new_octets(4 * count), "float32")


def _copy(source: Buffer, target: Buffer) -> Request:
    work: Callable[[], Any] = functools.partial(np.copyto, target.octets, source.octets)
    return LocalRequest(work)
