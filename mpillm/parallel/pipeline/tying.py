"""Tie a weight whose two uses are in different stages, such as a head that is the embedding.

Each use has a leaf of its own. Each leaf's gradient is summed over all microbatches and data ranks;
then the two sums are added. This is one order of sums in every layout. On one rank both leaves
share their memory. On two ranks they are copies, which equal updates keep equal.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.models.part_module import PartModule

if TYPE_CHECKING:
    from mpi4py import MPI


class TiedWeight:
    """This rank's leaves of one tied weight: both, one or none. Every rank of the pipeline axis
    makes it.
    """

    def __init__(
        self,
        parts: Sequence[PartModule],
        names: tuple[str, str],
        axis: Axis,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """Find the leaves in this rank's `parts`. `names`: follower and leader, which is saved."""
        follower, leader = names
        self._leader = _find(parts, leader)
        self._follower = _find(parts, follower)
        if self._leader is not None and self._follower is not None:
            # Another leaf over the same memory: autograd then keeps the two gradients apart.
            leaf = nn.Parameter(self._leader.data)
            _holder(parts, follower).set_weight(follower, leaf)
            self._follower = leaf
        # One leaf here and one on another rank: the two ranks need a communicator. Split is
        # collective, so every rank of the axis calls it.
        alone = (self._leader is None) != (self._follower is None)
        pair: MPI.Intracomm = axis.comm.Split(int(alone), axis.rank)  # type: ignore[assignment]
        self._group = Communicator(pair, warn=warn) if alone else None
        pair.Free()

    @property
    def counted_elsewhere(self) -> list[nn.Parameter]:
        """The follower: a norm counts each weight once, by its leader."""
        return [] if self._follower is None else [self._follower]

    @property
    def sharing_memory(self) -> list[nn.Parameter]:
        """The follower where the leader's update changes it too."""
        return self.counted_elsewhere if self._leader is not None else []

    def reduce(self) -> None:
        """Leave the sum of both gradients in both leaves.

        Every rank calls it, after the reduction over the data axis.
        """
        own, other = self._leader, self._follower
        if self._group is not None:
            weight = own if own is not None else other
            assert weight is not None
            self._group.allreduce(weight.grad)
        elif own is not None and other is not None:
            assert own.grad is not None
            assert other.grad is not None
            own.grad.add_(other.grad)

    def close(self) -> None:
        """Free the communicator. Every rank calls it."""
        if self._group is not None:
            self._group.free()


def _find(parts: Sequence[PartModule], name: str) -> nn.Parameter | None:
    held = (dict(part.named_parameters(remove_duplicate=False)) for part in parts)
    return next((weights[name] for weights in held if name in weights), None)


def _holder(parts: Sequence[PartModule], name: str) -> PartModule:
    return next(
        part for part in parts if name in dict(part.named_parameters(remove_duplicate=False))
    )
