"""A head that is the embedding, where the two stand in different stages.

Each has a leaf of its own, so that the gradients of the two are summed apart, over all microbatches and data ranks,
and then with each other: one order of sums, wherever the stages are. On one rank both leaves share their memory; on two
they are copies, which equal updates keep equal.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.models.decoder import Decoder

if TYPE_CHECKING:
    from mpi4py import MPI


def loosen(begin: Decoder, end: Decoder) -> None:
    """Give the head of `end` a leaf of its own over the memory of the embedding of `begin`."""
    assert begin.embedding is not None
    assert end.head is not None
    end.head.weight = nn.Parameter(begin.embedding.weight.data)


class Tie:
    """This rank's ends of a tie: both, one or none. Every rank of the pipeline axis makes it, before its buckets."""

    def __init__(
        self, parts: Sequence[Decoder], axis: Axis, warn: Callable[[str], None] = silent
    ) -> None:
        """`parts`: of this rank, in the model's order."""
        begin, end = parts[0] if parts[0].begins else None, parts[-1] if parts[-1].ends else None
        if begin is not None and end is not None:
            loosen(begin, end)
        self._embedding = _weight(None if begin is None else begin.embedding)
        self._head = _weight(None if end is None else end.head)
        color = int((begin is None) != (end is None))
        pair: MPI.Intracomm = axis.comm.Split(color, axis.rank)  # type: ignore[assignment]
        self._group = Communicator(pair, warn=warn) if color else None
        pair.Free()

    @property
    def twins(self) -> list[nn.Parameter]:
        """The head, for who counts each weight once: its gradient becomes the embedding's."""
        return [] if self._head is None else [self._head]

    @property
    def followers(self) -> list[nn.Parameter]:
        """Parameters that another's update changes too: the head that shares the embedding's memory."""
        return self.twins if self._embedding is not None else []

    def reduce(self) -> None:
        """Leave the sum of both gradients in both. Every rank calls it, after the sums over the data axis."""
        own, other = self._embedding, self._head
        if self._group is not None:
            weight = own if own is not None else other
            assert weight is not None
            self._group.allreduce(weight.grad)
        elif own is not None and other is not None:
            assert own.grad is not None
            assert other.grad is not None
            own.grad.add_(other.grad)

    def close(self) -> None:
        """Every rank calls it."""
        if self._group is not None:
            self._group.free()


def _weight(module: nn.Module | None) -> nn.Parameter | None:
    return None if module is None else module.get_parameter("weight")
