"""From a call to requests: the copies, messages, sums and scalings that make up one collective."""

import functools
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm import kernel
from mpillm.comm.algorithms.algorithm_catalog import schedule
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import SHORT_FLOATS, Buffer, from_octets, new_octets
from mpillm.comm.executors.blockwise import make_executor
from mpillm.comm.executors.hierarchical import HierarchicalPiece, HierarchicalRequest
from mpillm.comm.executors.mpi_library import mpi_barrier, mpi_request
from mpillm.comm.executors.reference import reference
from mpillm.comm.executors.request import LocalRequest, Operands, Request, chain
from mpillm.comm.executors.segmented import Scratch, Segmentation
from mpillm.comm.selection import KIB, MIB, CollectiveCall
from mpillm.comm.shared.team import Location, NodeTeam
from mpillm.machine.node_map import NodeMap

if TYPE_CHECKING:
    from mpi4py import MPI

# Open MPI's eager limit over TCP is 64 KiB. Larger messages use rendezvous and queue after those in
# flight, which leaves a link that is busy both ways half idle.
SEGMENT_BYTES = 60 * KIB
IN_FLIGHT = 8
# Within a node, arrivals are added while they are in the processor's second cache. Over TCP,
# rendezvous of single pieces would leave the link idle between them, so there blocks stay whole.
ADDED_BYTES = 512 * KIB
# Hierarchical pieces are small, because the first one's sum and the last one's spread overlap with
# nothing. But each piece waits a few times for the node's other ranks, which may poll once a
# millisecond. And no message of a ring between nodes should be shorter than a segment.
PIECE_BYTES, MOST_PIECES = 2 * MIB, 16
# Between nodes, short pieces are bound by latency: few rounds.
FEW_ROUNDS_BYTES = 256 * KIB
TAGS_ACROSS = 1 << 14


class Dispatcher:
    """Makes the requests of one communicator's collectives.

    `team`: of this rank's node, where all nodes have one. `across` joins the ranks of equal local
    rank on all nodes; where nodes are uneven, each node's first rank, and it is None on the others.
    `next_tag`: of `comm`.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        team: NodeTeam | None,
        across: "MPI.Intracomm | None",
        node_map: NodeMap,
        next_tag: Callable[[], int],
    ) -> None:
        self._comm, self._team, self._across, self._even = comm, team, across, node_map.even
        added_bytes = ADDED_BYTES if node_map.on_one_node else None
        self._whole_blocks = Segmentation(None, IN_FLIGHT, added_bytes)
        self._segments = Segmentation(SEGMENT_BYTES, IN_FLIGHT, added_bytes)
        self._next_tag = next_tag
        # Where nodes are uneven not every rank is in `across`, so its runs are counted apart.
        self._next_tag_across = cycle(range(TAGS_ACROSS)).__next__
        self._scratch = Scratch()

    def build(
        self,
        call: CollectiveCall,
        algorithm: str,
        source: Buffer,
        target: Buffer,
        location: Location | None = None,
    ) -> Request:
        """Make the request of `call` by `algorithm`; `source` is `target` where it is in place.

        `location`: of the arrays, where the caller has asked the team for it already.
        """
        if call.operation == "barrier":
            if self._team is not None and algorithm == "shared":
                return self._team.prepare("barrier", None, None)
            return mpi_barrier(self._comm)
        if self._comm.size == 1:
            return LocalRequest(
                lambda: None if source is target else np.copyto(target.octets, source.octets)
            )
        if algorithm == "shared":
            return self._shared(call, source, target, location)
        if call.fixed_order and call.op in ("sum", "mean") and source.element in SHORT_FLOATS:
            return self._widened(call, algorithm, source, target)
        # A mean is a sum, scaled where the result is.
        requests = [self._summed(call, algorithm, source, target)]
        if call.op == "mean" and (call.operation != "reduce" or self._comm.rank == call.root):
            own_block = call.operation == "reduce_scatter" and source is target
            result = self._own(target) if own_block else target
            requests.append(LocalRequest(functools.partial(result.scale, 1 / self._comm.size)))
        return chain(*requests)

    def _summed(
        self, call: CollectiveCall, algorithm: str, source: Buffer, target: Buffer
    ) -> Request:
        """Make the request of `call`, apart from a mean's division."""
        operands = Operands(source, target, "sum" if call.op == "mean" else call.op, call.root)
        if algorithm == "mpi":
            return mpi_request(self._comm, call.operation, operands)
        if algorithm == "reference":
            return LocalRequest(functools.partial(reference, self._comm, call, source, target))
        if algorithm == "two-level":
            return self._two_level(call, operands)
        return self._by_schedule(call.operation, algorithm, operands)

    def _shared(
        self, call: CollectiveCall, source: Buffer, target: Buffer, location: Location | None
    ) -> Request:
        """Let the node's team do all of it, mean included; all ranks are on one node."""
        assert self._team is not None
        root = self._comm.rank == call.root
        if call.operation == "broadcast":
            given, taken = (source, None) if root else (None, target)
            return self._team.prepare("broadcast", given, taken, root=call.root)
        op, scale = ("sum", 1 / self._comm.size) if call.op == "mean" else (call.op, 1.0)
        result = None if call.operation == "reduce" and not root else target
        return self._team.prepare(call.operation, source, result, op, scale, call.root, location)

    # ---- schedules ----

    def _own(self, whole: Buffer) -> Buffer:
        """Return this rank's block of `whole`."""
        bounds = block_bounds(whole.count, self._comm.size)
        return whole.part(bounds[self._comm.rank], bounds[self._comm.rank + 1])

    def _by_schedule(self, operation: str, algorithm: str, operands: Operands) -> Request:
        """Make the request of a schedule, which works in place in one array.

        Data to keep, or with another place, is copied before and after.
        """
        if operation == "alltoall":
            return self._exchange_blocks(algorithm, operands)
        source, target = operands.source, operands.target
        whole, before, after = target, [], []
        if operation == "reduce_scatter" and not operands.in_place:
            whole = source.empty(source.count)
            before = [_copy(source, whole)]
            after = [_copy(self._own(whole), target)]
        elif operation == "allgather" and not operands.in_place:
            before = [_copy(source, self._own(target))]
        elif operation == "reduce" and self._comm.rank != operands.root:
            # A rank that is not the root keeps its array: partial sums go elsewhere.
            whole = source.empty(source.count)
            before = [_copy(source, whole)]
        elif not operands.in_place:
            before = [_copy(source, target)]
        in_place = Operands(whole, whole, operands.op, operands.root)
        return chain(*before, self._scheduled(self._comm, operation, algorithm, in_place), *after)

    def _exchange_blocks(self, algorithm: str, operands: Operands) -> Request:
        source, target = operands.source, operands.target
        if operands.in_place:
            given = source.empty(source.count)
            before = _copy(source, given)
        else:
            given = source
            before = _copy(self._own(source), self._own(target))
        exchange = Operands(given, target)
        return chain(before, self._scheduled(self._comm, "alltoall", algorithm, exchange))

    def _scheduled(
        self, comm: "MPI.Intracomm", operation: str, algorithm: str, operands: Operands
    ) -> Request:
        segmented = algorithm == "segmented-ring"
        name = "ring" if segmented else algorithm
        plan = schedule(operation, name, comm.rank, comm.size, operands.root)
        segmentation = self._segments if segmented else self._whole_blocks
        next_tag = self._next_tag_across if comm is self._across else self._next_tag
        return make_executor(plan, comm, operands, segmentation, self._scratch, next_tag)

    # ---- two levels ----

    def _two_level(self, call: CollectiveCall, operands: Operands) -> Request:
        """Sum within each node, then between nodes, then spread within: each byte crosses the
        network once a node.

        Where the nodes are even, each rank takes a stripe across; else each node's first rank takes
        all.
        """
        assert self._team is not None
        source, target = operands.source, operands.target
        before = [] if operands.in_place else [_copy(source, target)]
        # An even node sends one stripe a rank, an uneven one the whole array from its first rank.
        across_bytes = target.octets.size // (self._team.comm.size if self._even else 1)
        algorithm = _between(call, across_bytes)
        bounds = block_bounds(target.count, _pieces(target.octets.size, self._comm.size))
        pieces = [
            self._piece(target.part(first, stop), operands.op, algorithm)
            for first, stop in pairwise(bounds)
        ]
        return chain(*before, HierarchicalRequest(pieces))

    def _piece(self, array: Buffer, op: str, algorithm: str) -> HierarchicalPiece:
        assert self._team is not None
        team = self._team.comm
        if self._even:
            bounds = block_bounds(array.count, team.size)
            stripe = array.part(bounds[team.rank], bounds[team.rank + 1])
            summed = self._team.prepare("reduce_scatter", array, array, op)
            spread = self._team.prepare("allgather", array, array)
        else:
            stripe, leads = array, team.rank == 0
            given, taken = (array, None) if leads else (None, array)
            summed = self._team.prepare("reduce", array, given, op)
            spread = self._team.prepare("broadcast", given, taken)
        crossed: Request = LocalRequest(lambda: None)
        if self._across is not None:
            crossed = self._scheduled(
                self._across, "allreduce", algorithm, Operands(stripe, stripe, op)
            )
        return HierarchicalPiece(summed, crossed, spread)

    # ---- fixed order of 16-bit floats ----

    def _widened(
        self, call: CollectiveCall, algorithm: str, source: Buffer, target: Buffer
    ) -> Request:
        """Sum in float32 from end to end and round once: the node team's result, at twice the
        bytes.
        """
        wide_source = _float32(source.count)
        wide_target = wide_source if source is target else _float32(target.count)
        inner = self.build(call, algorithm, wide_source, wide_target)
        takes = call.operation != "reduce" or self._comm.rank == call.root
        narrow = LocalRequest(
            lambda: kernel.narrow(target.code, target.octets, wide_target.octets) if takes else None
        )
        return chain(
            LocalRequest(lambda: kernel.widen(source.code, wide_source.octets, source.octets)),
            inner,
            narrow,
        )


def _between(call: CollectiveCall, nbytes: int) -> str:
    """Return the algorithm between nodes for a stripe of `nbytes`."""
    if nbytes < FEW_ROUNDS_BYTES:
        return "recursive-doubling"
    return "rabenseifner" if call.fixed_order else "segmented-ring"


def _pieces(nbytes: int, ranks: int) -> int:
    """Return the number of pieces that `two-level` cuts an array into."""
    return max(1, min(MOST_PIECES, nbytes // max(PIECE_BYTES, ranks * SEGMENT_BYTES)))


def _float32(count: int) -> Buffer:
    return from_octets(new_octets(4 * count), "float32")


def _copy(source: Buffer, target: Buffer) -> Request:
    return LocalRequest(functools.partial(np.copyto, target.octets, source.octets))
