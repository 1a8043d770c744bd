"""A tied weight whose uses are in different stages, such as a head that is the embedding.

Each use has a leaf of its own. The gradients of the leaves are summed apart, over all microbatches
and data ranks, and then with each other: in a fixed order in that of their names, wherever the
stages are. On one rank the leaves share their memory; on several they are copies, which equal
updates keep equal.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.models.part_module import PartModule

if TYPE_CHECKING:
    from mpi4py import MPI


class TiedWeight:
    """This rank's leaves of one tied weight, or none. Every rank of the pipeline axis makes it."""

    def __init__(
        self,
        parts: Sequence[PartModule],
        leader: str,
        followers: Sequence[str],
        axis: Axis,
        warn: Callable[[str], None] = silent,
        fixed_order: bool = False,
    ) -> None:
        """Find the leaves in `parts`, of this rank. The `leader` is the name that is saved.

        `fixed_order`: sum the leaves in the order of their names here, wherever they are.
        """
        self._leaves: list[nn.Parameter] = []
        self._numbers: list[int] = []
        self._holds_leader = False
        # A sum of two has one order.
        self._uses = len(followers) + 1 if fixed_order and len(followers) > 1 else 0
        for number, name in enumerate((leader, *followers)):
            for part in parts:
                weight = dict(part.named_parameters(remove_duplicate=False)).get(name)
                if weight is None:
                    continue
                if self._leaves:
                    # Another leaf over the same memory: autograd keeps the two gradients apart.
                    weight = nn.Parameter(self._leaves[0].data)
                    part.set_weight(name, weight)
                self._leaves.append(weight)
                self._numbers.append(number)
                self._holds_leader |= name == leader
        holds = bool(self._leaves)
        holders: MPI.Intracomm = axis.comm.Split(int(holds), axis.rank)  # type: ignore[assignment]
        several = holds and holders.size > 1
        self._group = Communicator(holders, warn=warn) if several else None
        # The Communicator has a duplicate of its own.
        holders.Free()

    @property
    def counted_elsewhere(self) -> list[nn.Parameter]:
        """The leaves that a norm leaves out: each weight counts once, by its leader."""
        return self._leaves[1:] if self._holds_leader else self._leaves

    @property
    def sharing_memory(self) -> list[nn.Parameter]:
        """The leaves that an update of this rank's first leaf changes too."""
        return self._leaves[1:]

    def reduce(self, gradient_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Leave the sum of all gradients in that of the first leaf of each rank.

        Every rank calls it, after the sums over the data axis.
        """
        if not self._leaves:
            return
        total = gradient_of(self._leaves[0])
        if self._group is not None and self._uses:
            total.copy_(self._sum_in_order(self._group, gradient_of))
            return
        for leaf in self._leaves[1:]:
            total.add_(gradient_of(leaf))
        if self._group is not None:
            self._group.allreduce(total)

    def _sum_in_order(
        self, group: Communicator, gradient_of: Callable[[nn.Parameter], Tensor]
    ) -> Tensor:
        """Sum the leaves of all ranks in the order of their numbers; return the sum."""
        first = gradient_of(self._leaves[0])
        # Zeros change no bit of a sum: each leaf reaches all ranks as it is.
        every = first.new_zeros((self._uses, *first.shape))
        for number, leaf in zip(self._numbers, self._leaves, strict=True):
            every[number] = gradient_of(leaf)
        group.allreduce(every)
        total = every[0]
        for each in every[1:]:
            total.add_(each)
        return total

    def close(self) -> None:
        """Free the communicator. Every rank calls it."""
        if self._group is not None:
            self._group.free()
