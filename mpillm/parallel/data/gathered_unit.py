"""The values of some weights that a rank has in memory only while they are read.

A rank keeps its own runs in one block. A gather fills a row of all blocks, and copies the values to
where the weights had their memory before: tensors that autograd saved read them there. The way of
FullyShardedDataParallel (Zhao et al., "PyTorch FSDP", VLDB 2023, section 3.2).
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpillm.comm.persistent import PersistentCollective
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.sharded_part import ShardedPart

Wait = Callable[[PersistentCollective], None]


class _Stretch(NamedTuple):
    """A stretch of the blocks, which is gathered at once."""

    own: Tensor
    """The values of this rank."""
    place: Tensor
    """Where these values are in the row."""
    calls: list[PersistentCollective]
    """In turn, they fill the row."""
    rooms: list[Tensor]
    """The runs of all shards in the weights."""
    values: list[Tensor]
    """The same runs in the row."""


class GatheredUnit:
    """The weights with the `numbers` of `part`, which need no memory before a gather.

    `elements`: of the longest stretch over all shards; 0: one stretch.
    """

    def __init__(
        self,
        part: ShardedPart,
        numbers: Collection[int],
        group: ShardGroup,
        elements: int = 0,
    ) -> None:
        self._weights = {number: part.weights[number] for number in sorted(numbers)}
        self._units = part.layout.units_of(self._weights, elements)
        self._group = group
        first = next(iter(self._weights.values()))
        self.own = torch.zeros(self._units[-1].last, dtype=first.dtype, device=first.device)
        """This rank's runs of the weights, from one use to the next."""
        longest = max(unit.last - unit.first for unit in self._units)
        self.row_elements = group.shards * longest
        """Of the row by which it is gathered."""
        self._stretches: list[_Stretch] = []
        self._offsets: dict[nn.Parameter, int] = {}
        for unit in self._units:
            for run in unit.runs[group.shard]:
                # A run that two stretches share begins in the first of them.
                self._offsets.setdefault(self._weights[run.weight], unit.first + run.offset)

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self._weights.values())

    def own_of(self, weight: nn.Parameter, count: int) -> Tensor:
        """Return this rank's run of a weight, of `count` elements."""
        first = self._offsets.get(weight, 0)
        return self.own[first : first + count]

    def prepare(self, row: Tensor) -> None:
        """Prepare the gathers by `row`, and free the weights. Every rank of the group calls it."""
        group = self._group
        # Views are made of memory that is there; they stay when it is freed.
        self._allocate()
        for unit in self._units:
            count = unit.last - unit.first
            blocks = row[: group.shards * count]
            calls, _ = group.prepare_gather(blocks, once_a_node=False)
            rooms, values = [], []
            for shard, runs in enumerate(unit.runs):
                for run in runs:
                    # Views of `data`: writing to them leaves autograd's versions as they are.
                    room = self._weights[run.weight].data.view(-1)
                    start = shard * count + run.offset
                    rooms.append(room[run.first : run.first + run.count])
                    values.append(blocks[start : start + run.count])
            own = self.own[unit.first : unit.last]
            place = blocks[group.shard * count : (group.shard + 1) * count]
            self._stretches.append(_Stretch(own, place, calls, rooms, values))
        self.free()

    @property
    def pending(self) -> PersistentCollective | None:
        """The first call of a gather that `start` has started, if there is one."""
        calls = self._stretches[0].calls
        return calls[0] if calls else None

    @torch.no_grad()
    def start(self, stretch: int = 0) -> None:
        """Start to gather; the row is in use until `complete` or `drop`."""
        own, place, calls, _, _ = self._stretches[stretch]
        place.copy_(own)
        if calls:
            calls[0].start()

    @torch.no_grad()
    def complete(self, wait: Wait) -> None:
        """Allocate the weights' memory, and fill it with the values that arrive; the row is free
        then. `wait` returns when a started call is complete.
        """
        self._allocate()
        for number, (_, _, calls, rooms, values) in enumerate(self._stretches):
            if number:
                self.start(number)
            self._arrive(calls, wait)
            torch._foreach_copy_(rooms, values)

    def drop(self, wait: Wait) -> None:
        """End a gather that was started and is not wanted."""
        # Later calls were not started, on any rank.
        self._arrive(self._stretches[0].calls[:1], wait)

    def _arrive(self, calls: list[PersistentCollective], wait: Wait) -> None:
        for number, call in enumerate(calls):
            wait(call if number == 0 else call.start())

    def _allocate(self) -> None:
        for weight in self._weights.values():
            weight.untyped_storage().resize_(weight.numel() * weight.element_size())

    def free(self) -> None:
        """Free the memory of the weights, which keep their shapes."""
        for weight in self._weights.values():
            weight.untyped_storage().resize_(0)

    def close(self) -> None:
        """Drop the prepared calls, ahead of the communicators."""
        self._stretches = []
        self.own = torch.empty(0)
