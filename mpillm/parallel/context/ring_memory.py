"""Where ring attention finds the keys and values of other ranks: in place, or passed on.

Each rank has two rows of keys and values, which all ranks of its node read in place, and a row of
gradient sums, to which all of them add. Between nodes, rows pass to the next node's rank of the
same place while the kernel computes. Without shared memory each rank counts as a node.

Two rows are enough: a row is written again after a barrier that all ranks reach when they have read
what it held.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.persistent import PersistentCollective
from mpillm.comm.progress_thread import ProgressThread
from mpillm.comm.selection import Profile
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.parallel.context.ring_steps import place_of, sources_of

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.comm.shared.team import SharedRows

# A vector register of AVX-512, and a cache line: no row begins within one.
ALIGN_BYTES = 64
# What a warning says where shared memory has no room.
INSTEAD = "the ranks of the context axis send keys and values as messages, which is slower"
KEYS_TAG, SUMS_TAG = 0, 1
# Training prepares few messages. An evaluation has rows of many lengths.
MOST_PREPARED = 64


class RingMemory:
    """The rows of one rank's node. Every rank of `axis` makes it, and calls its methods together.

    `nbytes`: of the largest keys and values of a rank. `sums`: how many gradients they have.
    `shares`: whether the ranks of a node may share memory. `profile`, `debug`, `warn`: as in
    Communicator.
    """

    def __init__(
        self,
        axis: Axis,
        nbytes: int,
        sums: int,
        *,
        shares: bool = True,
        profile: Profile | None = None,
        debug: bool = False,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.rank, self.size = axis.rank, axis.size
        row = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        total = 2 * row + 4 * sums
        make = partial(Communicator, profile=profile, debug=debug)
        self.nodes, self._local, shared = _share(axis, total, shares, partial(make, warn=warn))
        self._shared = shared
        node, self.place = place_of(self.rank, self.nodes)
        self.sources = sources_of(self.rank, self.nodes)
        """Whose keys this rank reads, in order, node by node."""
        if shared is None:
            whole = [torch.empty(total, dtype=torch.uint8)]
        else:
            whole = [torch.from_numpy(octets) for octets in shared.octets]
        self._keys = [[each[turn * row : turn * row + nbytes] for each in whole] for turn in (0, 1)]
        self._sums = [each[2 * row :].view(torch.float32) for each in whole]
        barrier = self._local.prepare("barrier") if self._local is not None else None
        self._barrier = barrier.run if barrier is not None else _nothing
        self._next = _NextNode(axis, self.nodes, node, self.place, make)
        self._travelling = [torch.empty(sums if len(self.nodes) > 1 else 0) for _ in range(2)]
        self._turn = 0
        self.moved_bytes = 0
        """Of keys, values and gradients: taken from other ranks, or added to theirs."""

    def keys_values(
        self, turn: int, place: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """View row number `turn` % 2 of the node's rank at `place` as keys and values."""
        return _viewed(self._keys[turn % 2][place], shape, dtype)

    def sums(self, place: int, shape: Sequence[int]) -> Tensor:
        """View the gradient sums of the node's rank at `place`, float32."""
        return self._sums[place][: torch.Size(shape).numel()].view(*shape)

    def travelling(self, turn: int, shape: Sequence[int]) -> Tensor:
        """View the memory of sums that pass between nodes: that of number `turn` % 2."""
        return self._travelling[turn % 2][: torch.Size(shape).numel()].view(*shape)

    def next_turn(self) -> int:
        """Number the rows of keys and values that are written next."""
        self._turn += 1
        return self._turn

    def barrier(self) -> None:
        """Wait for the ranks of the node: all have written, or read, what comes before."""
        self._barrier()

    def pass_on(self, tag: int, given: Tensor, taken: Tensor) -> "PersistentCollective":
        """Start to pass `given` to the next node, and to take `taken` from the one before.

        Both must not be touched until `arrived` returns.
        """
        self.moved_bytes += taken.nbytes
        return self._next.start(tag, given, taken)

    def arrived(self, passing: "PersistentCollective") -> None:
        """Return when `passing` is complete."""
        self._next.wait(passing)

    def close(self) -> None:
        """Free shared memory and communicators. Every rank of the axis calls it, last."""
        self._next.close()
        self._keys, self._sums = [], []
        if self._shared is not None:
            self._shared.free()
        if self._local is not None:
            self._local.free()


class _NextNode:
    """The ranks of the same place on the nodes before and after."""

    def __init__(
        self,
        axis: Axis,
        nodes: Sequence[Sequence[int]],
        node: int,
        place: int,
        make: Callable[..., Communicator],
    ) -> None:
        self._to = nodes[(node + 1) % len(nodes)][place]
        self._source = nodes[(node - 1) % len(nodes)][place]
        several = len(nodes) > 1
        self._comm = make(axis.comm, node_map=axis.node_map) if several else None
        # Most MPI libraries progress messages only inside a call, and the kernel is none.
        self._thread = None if self._comm is None else ProgressThread(self._comm)
        self._prepared: dict[tuple[int, ...], PersistentCollective] = {}
        self._flying = 0

    def start(self, tag: int, given: Tensor, taken: Tensor) -> PersistentCollective:
        assert self._comm is not None
        assert self._thread is not None
        # Rows stay where they are: their messages are prepared once.
        key = tag, given.data_ptr(), taken.data_ptr(), given.numel(), taken.numel()
        with self._thread.paused():
            if key not in self._prepared:
                if len(self._prepared) >= MOST_PREPARED and not self._flying:
                    self._prepared.clear()
                ends = given.flatten(), self._to, taken.flatten(), self._source
                self._prepared[key] = self._comm.prepare_exchange(*ends, tag=tag)
            passing = self._prepared[key].start()
        self._flying += 1
        self._thread.resume()
        return passing

    def wait(self, passing: PersistentCollective) -> None:
        assert self._thread is not None
        self._flying -= 1
        if not self._flying:
            self._thread.pause()
        with self._thread.paused():
            passing.wait()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.end()
        if self._comm is not None:
            self._comm.free()


def _share(
    axis: Axis, nbytes: int, shares: bool, make: Callable[..., Communicator]
) -> tuple[Sequence[Sequence[int]], "Communicator | None", "SharedRows | None"]:
    """Allocate a row of `nbytes` a rank in the memory of each node; return the nodes, and the
    communicator of this one.

    Nodes of unequal numbers of ranks, and those without room, share nothing: then each rank is a
    node, on all ranks of the axis.
    """
    node_map = axis.node_map or map_nodes(axis.comm)
    alone = [[rank] for rank in range(axis.size)]
    if not shares or not node_map.even or len(node_map.nodes) == axis.size:
        return alone, None, None
    node_comm = node_map.split(axis.comm)
    local = make(node_comm, node_map=_one_node(node_comm, node_map))
    node_comm.Free()
    rows = local.allocate(nbytes, "uint8", INSTEAD)
    if axis.comm.allreduce(rows is not None) == axis.size:
        return node_map.nodes, local, rows
    if rows is not None:
        rows.free()
    local.free()
    return alone, None, None


def _one_node(comm: "MPI.Intracomm", node_map: NodeMap) -> NodeMap:
    return NodeMap((tuple(range(comm.size)),), False, node_map.library)


def _viewed(octets: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return octets[:nbytes].view(dtype).view(*shape)


def _nothing() -> None:
    """Wait for nobody: the rank is alone."""
