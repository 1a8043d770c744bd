"""Weights gathered layer by layer ahead of their use, and freed after it: ZeRO-3 where ranks share
no memory. A layer is one of the model's blocks.

The gather of the next block is started before one computes. In a forward pass that is the one after
it, in a backward pass the one before it. On CPUs it arrives meanwhile. On GPUs NCCL works in the
stream of the passes, so that both take turns. Weights outside of blocks are gathered once a step:
embeddings, the last norm, the head.

All ranks of the axis gather in one order, that of their passes. Their schedules are the same, and
autograd computes the blocks of a graph in the reverse order of the forward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpillm.comm.backoff import Backoff
from mpillm.comm.persistent import PersistentCollective
from mpillm.parallel.data.gathered_unit import GatheredUnit
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.shard_layout import UNIT_BYTES
from mpillm.parallel.data.sharded_part import ShardedPart

Aliases = Mapping[nn.Parameter, nn.Parameter]
"""A leaf over the memory of another one → that one."""


class GatheredWeights:
    """The weights of `parts`, which have values within `reading` alone.

    `blocks`: of each part, in the order of a forward pass. `group`: for gathers alone, so that
    gradients are summed between the start of a gather and its end. Every rank of the group makes
    it.
    """

    def __init__(
        self,
        parts: Sequence[ShardedPart],
        blocks: Sequence[Sequence[nn.Module]],
        group: ShardGroup,
        same: Aliases,
    ) -> None:
        self._group, self._same = group, same
        self.progress: Callable[[], None] | None = None
        """Called while a gather is waited for: progresses the messages between stages, for which
        other ranks may wait first.
        """
        self._after: dict[GatheredUnit, GatheredUnit] = {}
        self._before: dict[GatheredUnit, GatheredUnit] = {}
        self._hooks: list[Any] = []
        numbers = _numbers_by_block(parts, blocks, same)
        self._blocks: list[GatheredUnit] = []
        for number, (part, modules) in enumerate(zip(parts, blocks, strict=True)):
            self._add_blocks(part, modules, [numbers[number, i] for i in range(len(modules))])
        # Others are gathered by the room of the longest block.
        longest = max((unit.row_elements for unit in self._blocks), default=0)
        self._others = [
            GatheredUnit(part, found, group, longest or UNIT_BYTES // 4)
            for number, part in enumerate(parts)
            if (found := numbers[number, None])
        ]
        units = [*self._blocks, *self._others]
        self._unit_of = {weight: unit for unit in units for weight in unit.weights}
        example = units[0].own
        elements = max(unit.row_elements for unit in units)
        self.row = torch.empty(elements, dtype=example.dtype, device=example.device)
        """The room in which values arrive, of the longest block."""
        for unit in units:
            unit.prepare(self.row)
        self._held: GatheredUnit | None = None
        self._coming: GatheredUnit | None = None
        # Whether the passes of the held block are backward ones, which may compute it again.
        self._backward = False

    def _add_blocks(
        self, part: ShardedPart, modules: Sequence[nn.Module], numbers: Sequence[list[int]]
    ) -> None:
        """Make the units of a part's blocks, in order, and let the passes call for them."""
        last: GatheredUnit | None = None
        for module, own in zip(modules, numbers, strict=True):
            if not own:
                continue
            unit = GatheredUnit(part, own, self._group)
            self._blocks.append(unit)
            if last is not None:
                self._after[last], self._before[unit] = unit, last
            last = unit
            hooks = [
                module.register_forward_pre_hook(partial(self._before_forward, unit)),
                module.register_forward_hook(partial(self._after_forward, unit)),
            ]
            # A layer may be called from outside of its block.
            hooks += [
                layer.register_forward_pre_hook(partial(self._before_layer, unit))
                for layer in module.modules()
                if layer is not module and any(True for _ in layer.parameters(recurse=False))
            ]
            self._hooks += hooks

    @property
    def nodes_apart(self) -> bool:
        """Whether each node has all shards, so that the weights of nodes may be compared."""
        return self._group.replica[1] > 1

    def own_of(self, weight: nn.Parameter, count: int) -> Tensor:
        """Return the `count` values of `weight` that this rank keeps."""
        weight = self._same.get(weight, weight)
        return self._unit_of[weight].own_of(weight, count)

    # ---- passes ----

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let the block run passes. Every rank of the group enters it, and runs the same ones."""
        self._backward = False
        for unit in self._others:
            unit.start()
            unit.complete(self._wait)
        yield
        if self._coming is not None:
            self._coming.drop(self._wait)
        for unit in self._others:
            unit.free()
        if self._held is not None:
            self._held.free()
        self._held = self._coming = None

    def read_each(self, weights: Iterable[nn.Parameter]) -> Iterator[Tensor]:
        """Yield a copy of each weight, one after another. Every rank of the group iterates over the
        same.
        """
        with self.reading():
            for weight in weights:
                unit = self._unit_of.get(self._same.get(weight, weight))
                if unit in self._blocks:
                    self._use(unit)
                # A view by NumPy would fix the memory: torch does not free it any more.
                yield weight.detach().clone()

    def _before_forward(self, unit: GatheredUnit, module: nn.Module, given: Any) -> None:
        # A backward pass calls the block that it holds to compute it again.
        if self._held is not unit or not self._backward:
            self._backward = False
            self._use(unit)
            self._fetch(self._after.get(unit))

    def _before_layer(self, unit: GatheredUnit, layer: nn.Module, given: Any) -> None:
        if self._held is unit:
            self.poll()
        else:
            self._use(unit)

    def _after_forward(self, unit: GatheredUnit, module: nn.Module, given: Any, made: Any) -> None:
        """Ask for the unit again ahead of the backward pass of what the block has made."""
        for output in made if isinstance(made, tuple) else (made,):
            if isinstance(output, Tensor) and output.requires_grad:
                hook = partial(self._before_backward, unit)
                output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _before_backward(self, unit: GatheredUnit, gradient: Tensor) -> None:
        self._backward = True
        self._use(unit)
        self._fetch(self._before.get(unit))

    def before_gradients(self, leaves: Sequence[Tensor]) -> None:
        """Gather ahead of the gradients of `leaves` alone: the weight half of a backward pass,
        which walks the blocks in the order of the forward pass.
        """
        for leaf in leaves:
            weight = self._same.get(leaf, leaf)  # type: ignore[call-overload]
            unit = self._unit_of.get(weight)
            if unit in self._blocks:
                self._backward = True
                self._use(unit)
                self._fetch(self._after.get(unit))

    def pass_ended(self) -> None:
        """Note that a backward pass, or a half of it, is complete: the next call of a block is
        forward.
        """
        self._backward = False

    def poll(self) -> None:
        """Progress the gather of the next block, without waiting."""
        if self._coming is not None:
            call = self._coming.pending
            if call is not None and not call.enqueued:
                call.test()

    # ---- gathers ----

    def _use(self, unit: GatheredUnit) -> None:
        """Hold `unit`, and no other block."""
        if self._held is unit:
            return
        if self._coming is not None and self._coming is not unit:
            # All ranks expected it: the order of their passes is the same.
            self._coming.drop(self._wait)
            self._coming = None
        if self._coming is None:
            unit.start()
        if self._held is not None:
            self._held.free()
        unit.complete(self._wait)
        self._held, self._coming = unit, None

    def _fetch(self, unit: GatheredUnit | None) -> None:
        """Start to gather `unit`, which is used next, unless another gather is in flight."""
        if unit is not None and self._coming is None:
            unit.start()
            self._coming = unit

    def _wait(self, call: PersistentCollective) -> None:
        if self.progress is None or call.enqueued:
            call.wait()
            return
        back_off = Backoff()
        while not call.test():
            self.progress()
            back_off()

    def close(self) -> None:
        """Free values and communicators. Every rank of the group calls it."""
        for hook in self._hooks:
            hook.remove()
        for unit in (*self._blocks, *self._others):
            unit.close()
        self.row = torch.empty(0)
        self._hooks, self._blocks, self._others = [], [], []
        self._after, self._before, self._unit_of = {}, {}, {}
        self._group.free()


def _numbers_by_block(
    parts: Sequence[ShardedPart], blocks: Sequence[Sequence[nn.Module]], same: Aliases
) -> dict[tuple[int, int | None], list[int]]:
    """Return the numbers of the weights in each block, by (part, block).

    A weight outside of blocks, or that several share, is with (part, None); aliases are left out.
    """
    found: dict[tuple[int, int | None], list[int]] = {}
    places: dict[nn.Parameter, set[tuple[int, int | None]]] = {}
    for p, (part, modules) in enumerate(zip(parts, blocks, strict=True)):
        held = [set(module.parameters()) for module in modules]
        for weight in part.weights:
            inside = {(p, i) for i, weights in enumerate(held) if weight in weights}
            places.setdefault(same.get(weight, weight), set()).update(inside or {(p, None)})
    for p, (part, modules) in enumerate(zip(parts, blocks, strict=True)):
        found |= {(p, i): [] for i in (*range(len(modules)), None)}
        for number, weight in enumerate(part.weights):
            if weight not in same:
                one, *others = places[weight]
                found[(p, None) if others else one].append(number)
    return found
