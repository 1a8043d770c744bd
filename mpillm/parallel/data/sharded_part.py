"""The weights of one part of the model in shards: the sums of their gradients, unit by unit.

A unit is summed as soon as the gradients of all weights in it are complete, in one order on all
ranks: a rank whose graph has another order keeps its gradients where autograd put them until then.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpillm.comm.persistent import PersistentCollective
from mpillm.parallel.data.buckets import NORM_PIECE_ELEMENTS
from mpillm.parallel.data.shard_group import Action, ShardGroup
from mpillm.parallel.data.shard_layout import Deal, Run, ShardLayout, Unit
from mpillm.parallel.data.sum_tree import SumTree


class _UnitSum(NamedTuple):
    """The prepared sums of a unit."""

    row: Tensor
    """A block a shard: the gradients of this rank, to be summed over the axis."""
    first: Action
    """Sum the row, and make the own block the gradient."""
    more: Action
    """Sum the row, and add the own block to the gradient."""


class ShardedPart:
    """The trained `weights` of a part, whose shards the ranks of `group` own."""

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        group: ShardGroup,
        unit_elements: int,
        deals: Sequence[Deal],
    ) -> None:
        """`unit_elements`: of a unit over all shards. `deals`: of each weight."""
        # The backward pass completes gradients in about the reverse order.
        self.weights = list(reversed(weights))
        counts = tuple(weight.numel() for weight in self.weights)
        self.layout = ShardLayout(counts, group.shards, tuple(reversed(deals)))
        self.units: list[Unit] = self.layout.units(unit_elements)
        self._shard, self._shards = group.shard, group.shards
        self._own = {run.weight: run for run in self.layout.streams[group.shard]}
        device = self.weights[0].device if self.weights else torch.device("cpu")
        self.gradient = torch.zeros(self.layout.length, dtype=torch.float32, device=device)
        """The stream of this rank's gradients, summed over the axis."""
        self._sums: list[_UnitSum] = []
        self._totals: list[Tensor] = []
        self._gathers: list[Action] = []
        self._units_of = Counter(number for unit in self.units for number in unit.weights)
        self._trees = [SumTree() for _ in self.units]
        self._reset()
        self._microbatches = 0

    @property
    def longest_unit(self) -> int:
        """The elements of the longest unit over all shards."""
        return self._shards * max((unit.last - unit.first for unit in self.units), default=0)

    def run_of(self, number: int) -> Run:
        """Return this rank's run of a weight, which may be empty."""
        return self._own.get(number, Run(number, 0, 0, 0))

    def gradient_of(self, number: int) -> Tensor:
        """Return the gradient of this rank's run of a weight, after `finish`."""
        run = self.run_of(number)
        return self.gradient[run.offset : run.offset + run.count]

    # ---- collectives ----

    def prepare(
        self, group: ShardGroup, row: Tensor, scratch: Tensor, fixed_order: bool, adds: bool
    ) -> None:
        """Prepare the sums of all units, in `row`. `scratch`: room for a block of its dtype.

        `adds`: whether a step sums several times.
        """
        for unit in self.units:
            count = unit.last - unit.first
            own, block = self.gradient[unit.first : unit.last], scratch[:count]
            blocks = row[: self._shards * count]
            direct = row.dtype == own.dtype
            first = group.prepare_sum(blocks, own if direct else block, fixed_order)
            more = first
            if adds:
                more = group.prepare_sum(blocks, block, fixed_order) if direct else first
                more = _then(more, own.add_, block)
            if not direct:
                first = _then(first, own.copy_, block)
            self._sums.append(_UnitSum(blocks, first, more))

    def add_up_whole(self) -> None:
        """Add up the whole gradients of a step's microbatches on each rank, ahead of the sums."""
        device = self.gradient.device
        self._totals = [
            torch.zeros(self._shards * (unit.last - unit.first), device=device)
            for unit in self.units
        ]

    def prepare_gather(self, group: ShardGroup, values: Tensor, once_a_node: bool) -> None:
        """Prepare the way of new values from the owners to where ranks read them, by `values`."""
        for unit in self.units:
            row = values[: self._shards * (unit.last - unit.first)]
            calls, arriving = group.prepare_gather(row, once_a_node)
            if arriving:
                self._gathers.append(partial(self._pass_on, unit, row, calls, arriving))

    def _pass_on(
        self, unit: Unit, row: Tensor, calls: list[PersistentCollective], arriving: list[int]
    ) -> None:
        """Gather the values of a unit by `row`."""
        for here, there in self._places(unit, row, [self._shard]):
            there.copy_(here)
        for call in calls:
            call.run()
        for here, there in self._places(unit, row, arriving):
            here.copy_(there)

    def _places(
        self, unit: Unit, row: Tensor, shards: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair the values of weights with their places in a row, for the runs of `shards`."""
        count = unit.last - unit.first
        return [
            (
                self.weights[run.weight].data.view(-1)[run.first : run.first + run.count],
                row[shard * count + run.offset : shard * count + run.offset + run.count],
            )
            for shard in shards
            for run in unit.runs[shard]
        ]

    def gather(self) -> None:
        """Take new values from their owners, where this rank does not share their memory."""
        for run in self._gathers:
            run()

    # ---- a step ----

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        for weight in self.weights:
            weight.grad = None
        self._microbatches = 0
        self._reset()

    def _reset(self) -> None:
        """Expect the gradients of all weights."""
        self._waiting = self._units_of.copy()
        self._next = 0
        self._complete: set[int] = set()

    def ready(self, number: int) -> None:
        """Note that the gradient of a weight is complete in this microbatch."""
        self._complete.add(number)
        self._advance()

    def _advance(self) -> None:
        while self._next < len(self.units):
            unit = self.units[self._next]
            if not self._complete.issuperset(unit.weights):
                return
            self._take(self._next)
            self._next += 1

    @torch.no_grad()
    def _take(self, index: int) -> None:
        """Lay the gradients of a complete unit into its row; sum it, unless the step's end does."""
        unit, sums = self.units[index], self._sums[index]
        if self._totals:
            self._lay(unit, self._totals[index], adds=self._microbatches > 0)
        else:
            self._lay(unit, sums.row, adds=False)
        for number in unit.weights:
            self._waiting[number] -= 1
            if not self._waiting[number]:
                self.weights[number].grad = None
        if not self._totals:
            (sums.more if self._microbatches else sums.first)()

    def _lay(self, unit: Unit, row: Tensor, adds: bool) -> None:
        count = unit.last - unit.first
        for shard, runs in enumerate(unit.runs):
            for run in runs:
                start = shard * count + run.offset
                room = row[start : start + run.count]
                gradient = self.weights[run.weight].grad
                if gradient is None:
                    if not adds:
                        room.zero_()
                    continue
                part = gradient.reshape(-1)[run.first : run.first + run.count]
                if adds:
                    room.add_(part)
                else:
                    room.copy_(part)

    def end_microbatch(self) -> None:
        """Complete what no backward pass has reached: its gradient is 0."""
        self._complete.update(range(len(self.weights)))
        self._advance()
        self._microbatches += 1
        self._reset()

    @torch.no_grad()
    def fold(self) -> None:
        """With a fixed order: add a microbatch's gradients to the trees of sums."""
        for unit, tree in zip(self.units, self._trees, strict=True):
            count = self._shards * (unit.last - unit.first)
            row = torch.zeros(count, dtype=torch.float32, device=self.gradient.device)
            self._lay(unit, row, adds=False)
            tree.add(row)
        for weight in self.weights:
            weight.grad = None

    def finish(self) -> None:
        """Sum what the microbatches have left to the end of the step. All ranks call it."""
        for index, (tree, sums) in enumerate(zip(self._trees, self._sums, strict=True)):
            total = self._totals[index] if self._totals else tree.take()
            if total is not None:
                sums.row.copy_(total)
                sums.first()

    def norm_pieces(self, left_out: Collection[int]) -> list[Tensor]:
        """Cut the gradients of this rank's runs into pieces, but those of the weights with the ids
        `left_out`.
        """
        return [
            piece
            for number, weight in enumerate(self.weights)
            if id(weight) not in left_out and self.run_of(number).count
            for piece in torch.split(self.gradient_of(number), NORM_PIECE_ELEMENTS)
        ]

    def close(self) -> None:
        """Drop rows and prepared collectives, ahead of the communicators."""
        self.begin()
        self._sums, self._gathers, self._totals = [], [], []
        self.gradient = torch.empty(0)


def _then(sums: Action, change: Callable[[Tensor], Tensor], block: Tensor) -> Action:
    def run() -> None:
        sums()
        change(block)

    return run
