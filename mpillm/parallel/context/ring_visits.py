"""The keys and values of all ranks, as they come by a rank, and the way of their gradients home.

Shapes: B sequences, T positions of a rank, S of the source of a block, K heads of keys and values,
D width of a head.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from mpillm.comm.persistent import PersistentCollective
from mpillm.parallel.context.ring_memory import KEYS_TAG, SUMS_TAG, RingMemory
from mpillm.parallel.context.zigzag import own_length


def visits(
    memory: RingMemory, k_BTKD: Tensor, v_BTKD: Tensor, length: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (source, its place in the node, k, v), k and v (B, K, S, D), for each rank of the ring.

    `length`: of the whole sequences. The keys and values of the next node arrive meanwhile.
    """
    rows, _, *heads = k_BTKD.shape

    def view(turn: int, place: int, source: int) -> Tensor:
        shape = 2, rows, own_length(source, memory.size, length), *heads
        return memory.keys_values(turn, place, shape, k_BTKD.dtype)

    turn, own = memory.next_turn(), memory.place
    kv_2BTKD = view(turn, own, memory.rank)
    kv_2BTKD[0].copy_(k_BTKD)
    kv_2BTKD[1].copy_(v_BTKD)
    # All keys and values of the node are there.
    memory.barrier()
    for number, sources in enumerate(memory.sources):
        passing = None
        if number + 1 < len(memory.sources):
            given = view(turn, own, sources[0])
            taken = view(turn + 1, own, memory.sources[number + 1][0])
            passing = memory.pass_on(KEYS_TAG, given, taken)
        for step, source in enumerate(sources):
            place = (own - step) % len(sources)
            kv_2BKSD = view(turn, place, source).transpose(2, 3)
            if step:
                memory.moved_bytes += kv_2BKSD.nbytes
            yield source, place, kv_2BKSD[0], kv_2BKSD[1]
        if passing is not None:
            memory.arrived(passing)
            turn = memory.next_turn()
            # Those of the next node are there, and all ranks have read the last ones.
            memory.barrier()


class FoundGradients(NamedTuple):
    """Shares of the gradients of some keys and values, both (B, K, S, D)."""

    heads: slice
    keys: slice
    dk_BKSD: Tensor
    dv_BKSD: Tensor


class GradientSums:
    """The gradients of keys and values: sums over all ranks that attended to them.

    Ranks of a node add to the row of the source's place, one rank at a time. Sums then pass on, one
    node after the other, with the keys that they belong to.
    """

    def __init__(self, memory: RingMemory, k_BTKD: Tensor, length: int) -> None:
        rows, _, *heads = k_BTKD.shape
        self._memory, self._length = memory, length
        self._ends = rows, heads
        self._visit, self._step = 0, 0
        self._home: Tensor | None = None
        self._passing: PersistentCollective | None = None

    def add(self, source: int, place: int, found: Sequence[FoundGradients]) -> None:
        """Add this rank's shares of the gradients of `source`.

        Every rank calls it once a visit, in the order of `visits`.
        """
        memory = self._memory
        sums_2BKSD = memory.sums(place, self._shape(source)).transpose(2, 3)
        if self._step:
            # The rank that added to this row before is done.
            memory.barrier()
            memory.moved_bytes += sums_2BKSD.nbytes
        else:
            # The own row, which no other rank touches before the next barrier.
            sums_2BKSD.zero_()
        _add(found, sums_2BKSD)
        self._step += 1
        if self._step == len(memory.sources[self._visit]):
            memory.barrier()
            self._pass_on()
            self._visit, self._step = self._visit + 1, 0

    def add_own(self, found: Sequence[FoundGradients]) -> None:
        """Add to the gradients of this rank's own keys and values, after all visits.

        Meanwhile sums pass home from the node before.
        """
        assert self._home is not None
        _add(found, self._home.transpose(2, 3))

    def _pass_on(self) -> None:
        """Pass the sums of the visit that has ended to the next node: at last to their own."""
        memory, visit = self._memory, self._visit
        source = memory.sources[visit][0]
        node_sums = memory.sums(memory.place, self._shape(source))
        if not visit:
            self._home = node_sums.clone()
            return
        travelling = memory.travelling(visit, self._shape(source))
        if self._passing is None:
            travelling.copy_(node_sums)
        else:
            memory.arrived(self._passing)
            travelling += node_sums
        coming = memory.sources[(visit + 1) % len(memory.sources)][0]
        taken = memory.travelling(visit + 1, self._shape(coming))
        self._passing = memory.pass_on(SUMS_TAG, travelling, taken)

    def brought_home(self) -> tuple[Tensor, Tensor]:
        """Return the gradients (B, T, K, D) of this rank's own keys and values, float32."""
        assert self._home is not None
        memory = self._memory
        if self._passing is not None:
            memory.arrived(self._passing)
            self._home += memory.travelling(len(memory.sources), self._shape(memory.rank))
        return self._home[0], self._home[1]

    def _shape(self, source: int) -> tuple[int, ...]:
        rows, heads = self._ends
        return 2, rows, own_length(source, self._memory.size, self._length), *heads


def _add(found: Sequence[FoundGradients], sums_2BKSD: Tensor) -> None:
    for heads, keys, dk_BKSD, dv_BKSD in found:
        sums_2BKSD[0][:, heads, keys] += dk_BKSD
        sums_2BKSD[1][:, heads, keys] += dv_BKSD
