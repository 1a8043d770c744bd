"""ZeRO: gradients, optimizer states and weights in shards over the data axis (Rajbhandari et al.
2020).

Stage 1 adds up whole gradients on each rank, and shares out their sum and the optimizer's states.
Stage 2 shares out the gradients of each microbatch. Stage 3 keeps the weights once a node, in
memory that its ranks share: nothing is gathered there, and between nodes each value crosses once.
Where ranks share none, each keeps its own runs, and all are gathered layer by layer
(gathered_weights.py).

Two barriers a step are the law where ranks share weights: no rank writes before all have computed
their gradients (`finish`), none reads before all have written (`updated`).
"""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.errors import LayoutError
from mpillm.models.part_module import PartModule, initial_values
from mpillm.parallel.data.gathered_weights import GatheredWeights
from mpillm.parallel.data.gradient_sync import Gradients, GradientSync
from mpillm.parallel.data.norm_tails import NormTails
from mpillm.parallel.data.shard_group import ShardGroup
from mpillm.parallel.data.shard_layout import UNIT_BYTES, Deal
from mpillm.parallel.data.sharded_part import ShardedPart
from mpillm.parallel.data.weight_pages import aliases, place_alone, place_once_a_node
from mpillm.parallel.settings import ParallelSettings


@dataclass(frozen=True)
class ShardStep:
    """What of a step's plan shards depend on."""

    dtype: torch.dtype = torch.float32
    """Of the weights."""
    reduce_dtype: torch.dtype = torch.float32
    """Of the sums of gradients over ranks."""
    fixed_order: bool = False
    several: bool = True
    """Whether a step has several microbatches."""
    splits: bool = False
    """Whether backward passes have two halves."""
    device: torch.device | None = None
    """That computes; None: the one on which the weights were built."""


PLAIN_STEP = ShardStep()
NeedsWhole = Callable[[str, tuple[int, ...]], bool]


def cuts_all(name: str, shape: tuple[int, ...]) -> bool:
    """Allow each weight to be cut: the optimizer needs none of them whole."""
    return False


class ZeroGradients(GradientSync):
    """The gradients of `parts`, a rank's parts of the model, by name, in shards.

    Every rank of `axis` makes it, with the same weights in the same order. It moves the weights,
    which have no values then: `fill` sets them. `dtype`: of the weights. `needs_whole(name,
    shape)`: whether the optimizer needs a weight whole.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, nn.Parameter]],
        axis: Axis,
        settings: ParallelSettings,
        step: ShardStep = PLAIN_STEP,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
        *,
        needs_whole: NeedsWhole = cuts_all,
        tied: Container[str] = frozenset(),
        alike: bool = True,
        blocks: Sequence[Sequence[nn.Module]] | None = None,
    ) -> None:
        """`tied`: the names of weights that share their values with others, on other parts too.
        `alike`: see ShardGroup. `blocks`: of each part, in the order of its forward pass. Raises
        LayoutError on every rank where some shard is empty.
        """
        self._step, self._fixed_order, self._dtype = step, step.fixed_order, step.dtype
        # Whole gradients: a fixed order sums each rank's microbatches first.
        self._whole = settings.zero == 1 or step.fixed_order
        self._stage = settings.zero
        on_node = settings.zero_on_node
        self._group = ShardGroup(axis, profile, settings.debug, warn, on_node, alike)
        trained = [{n: w for n, w in part.items() if w.requires_grad} for part in parts]
        same = self._place([w for part in trained for w in part.values()], settings.zero == 3, warn)
        frozen = [w for part in parts for w in part.values() if not w.requires_grad]
        place_alone(frozen, step.dtype, step.device)
        elements = (settings.bucket_bytes or UNIT_BYTES) // 4
        self._parts = [
            ShardedPart(list(part.values()), self._group, elements, deals(part, needs_whole, tied))
            for part in trained
        ]
        self._check_shards()
        self._gathered: GatheredWeights | None = None
        if settings.zero == 3 and not self._once_a_node:
            # Communicators of their own: sums of gradients run while a gather is in flight.
            group = ShardGroup(axis, profile, settings.debug, warn, on_node, alike)
            own_blocks = blocks or [() for _ in parts]
            self._gathered = GatheredWeights(self._parts, own_blocks, group, same)
        self._prepare(step.reduce_dtype)
        self._home: dict[nn.Parameter, tuple[ShardedPart, int]] = {}
        for part in self._parts:
            for number, weight in enumerate(part.weights):
                self._home[weight] = part, number
                # A split backward pass may add to one weight several times, and calls each time:
                # then a microbatch's end completes all.
                if not step.splits:
                    add_hook = weight.register_post_accumulate_grad_hook
                    add_hook(self.ready)  # type: ignore[no-untyped-call]
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._tails = NormTails(self._parts, self._group) if step.fixed_order else None

    def _place(
        self, weights: Sequence[nn.Parameter], once_a_node: bool, warn: Callable[[str], None]
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Give the weights memory; return the leaves that share that of others."""
        same, device = aliases(weights), self._step.device
        own = [weight for weight in weights if weight not in same]
        on_host = device is None or device.type == "cpu"
        self._once_a_node = (
            once_a_node and on_host and place_once_a_node(own, self._dtype, self._group, warn)
        )
        if not self._once_a_node:
            # What is gathered has memory in passes alone: a GPU may have no room for all of it.
            place_alone(own, self._dtype, device, freed=once_a_node)
        for weight, other in same.items():
            weight.data = other.data
        return same

    def _check_shards(self) -> None:
        """Raise LayoutError on every rank where the optimizer of some rank has nothing to do."""
        layouts = [part.layout for part in self._parts]
        owned = [
            sum(len(layout.streams[shard]) for layout in layouts)
            for shard in range(self._group.shards)
        ]
        # An optimizer of whole weights needs one on each rank.
        whole = [deal != "even" for layout in layouts for deal in layout.deals].count(True)
        if all(owned) and (not whole or whole >= self._group.shards):
            return
        what = f"{whole} weights that the optimizer needs whole" if whole else "its weights"
        raise LayoutError(
            f"parallel.zero = {self._stage} gives each of {self._group.shards} ranks a share of "
            f"{what}, and there are too few in this part of the model; take fewer data ranks, "
            "parallel.zero = 0, or optimizer.name = adamw"
        )

    def _prepare(self, reduce_dtype: torch.dtype) -> None:
        """Allocate rows and prepare the collectives of all units, in one order on all ranks."""
        longest = max((part.longest_unit for part in self._parts), default=0)
        weight = next((w for part in self._parts for w in part.weights), None)
        device = weight.device if weight is not None else torch.device("cpu")
        row = self._group.allocate(longest, reduce_dtype, device)
        block = torch.empty(longest // self._group.shards, dtype=reduce_dtype, device=device)
        room = 0 if self._gathered else longest
        values = torch.empty(room, dtype=self._dtype, device=device)
        for part in self._parts:
            adds = not self._whole and self._step.several
            part.prepare(self._group, row, block, self._fixed_order, adds)
            if self._gathered is None:
                part.prepare_gather(self._group, values, self._once_a_node)
            if self._whole and not self._fixed_order:
                part.add_up_whole()

    @property
    def is_cut(self) -> bool:
        return True

    @property
    def gathered(self) -> GatheredWeights | None:
        return self._gathered

    def describe(self) -> str:
        units = sum(len(part.units) for part in self._parts)
        weights = "once a node" if self._once_a_node else "on each rank"
        if self._gathered:
            weights = "gathered layer by layer"
        when = "the step" if self._whole else "each microbatch"
        return (
            f"ZeRO-{self._stage}, {self._group.ways}, weights {weights}; {units} "
            f"unit{'s' * (units != 1)} summed after {when}"
        )

    # ---- values ----

    @torch.no_grad()
    def initialise(
        self,
        parts: Sequence[PartModule],
        seed: int,
        others: Container[nn.Parameter] = frozenset(),
    ) -> None:
        for part in parts:
            for name, weight in part.named_weights():
                if weight in others:
                    continue
                if self._sets(weight):
                    self.fill(weight, initial_values(part, name, tuple(weight.shape), seed))
        self.updated()

    def _sets(self, weight: nn.Parameter) -> bool:
        """Return whether this rank sets any value of `weight`."""
        if self._has_copies or weight not in self._home:
            return True
        part, number = self._home[weight]
        return part.run_of(number).count > 0

    @property
    def _has_copies(self) -> bool:
        """Whether each rank has all values of the weights, at any time."""
        return not (self._once_a_node or self._gathered)

    def _run(self, weight: nn.Parameter) -> Tensor:
        """Return the values of this rank's run of `weight`."""
        part, number = self._home[weight]
        run = part.run_of(number)
        if self._gathered:
            return self._gathered.own_of(weight, run.count)
        return weight.data.view(-1)[run.first : run.first + run.count]

    def fill(self, weight: nn.Parameter, values: Tensor) -> None:
        """Set the values of `weight`, float32 and whole, as far as this rank sets them.

        Call `updated` when all are set.
        """
        if weight not in self._home:
            # Frozen: each rank has a copy.
            weight.data.copy_(values)
            return
        part, number = self._home[weight]
        own = part.run_of(number)
        run = values.view(-1)[own.first : own.first + own.count]
        if self._has_copies:
            weight.data.copy_(values)
        else:
            self._run(weight).copy_(run)
        if weight in self._masters:
            self._masters[weight].data.view(-1).copy_(run)

    def optimizer_weights(
        self,
        weights: Mapping[str, nn.Parameter],
        values: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> Mapping[str, nn.Parameter]:
        """Return this rank's run of each weight: the weight's memory, or a float32 master of it."""
        found = {}
        for name, weight in weights.items():
            if weight not in self._home:
                found[name] = weight
                continue
            part, number = self._home[weight]
            run = part.run_of(number)
            if not run.count:
                continue
            own = self._run(weight)
            if self._dtype != torch.float32:
                own = torch.zeros(run.count, dtype=torch.float32, device=weight.device)
            # A whole weight keeps its shape, which an optimizer of matrices reads.
            is_whole = run.count == weight.numel()
            shape = weight.shape if is_whole else (run.count,)
            stepped = nn.Parameter(own.view(shape))
            stepped.grad = part.gradient_of(number).view(shape)
            # The dims of the whole weight choose its decay.
            stepped.whole_shape = weight.shape  # type: ignore[attr-defined]
            found[name] = stepped
            if self._dtype != torch.float32:
                self._masters[weight] = stepped
        return found

    def first_element(self, weight: nn.Parameter) -> int:
        if weight not in self._home:
            return 0
        part, number = self._home[weight]
        return part.run_of(number).first

    @torch.no_grad()
    def updated(self) -> None:
        for weight, master in self._masters.items():
            self._run(weight).copy_(master.data.view(-1))
        for part in self._parts:
            part.gather()
        if self._once_a_node:
            self._group.barrier()

    # ---- a step ----

    def begin(self, small: Callable[[Gradients], None] | None = None) -> None:
        assert small is None, "no rank has its whole gradients: setup refuses train.noise_scale"
        for part in self._parts:
            part.begin()

    def last_microbatch(self, part: int | None = None) -> None:
        pass

    def ready(self, parameter: nn.Parameter) -> None:
        if self._gathered:
            self._gathered.poll()
        part, number = self._home[parameter]
        # A fixed order adds up a microbatch as a whole, when it has ended.
        if not self._fixed_order:
            part.ready(number)

    def microbatch_ended(self, part: int) -> None:
        if self._gathered:
            self._gathered.pass_ended()
        if self._fixed_order:
            self._parts[part].fold()
        else:
            self._parts[part].end_microbatch()

    @torch.no_grad()
    def finish(self) -> None:
        # The last part first: its backward pass comes first.
        for part in reversed(self._parts):
            part.finish()
        if self._once_a_node:
            self._group.barrier()

    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        part, number = self._home[parameter]
        return part.gradient_of(number)

    def counted_gradients(
        self, replica: tuple[int, int], excluded: Collection[nn.Parameter] = ()
    ) -> list[Tensor]:
        """`replica`: along the axes apart from this one."""
        left_out = {id(weight) for weight in excluded}
        if self._tails is not None:
            pieces = self._tails.pieces(left_out)
        else:
            pieces = [piece for part in self._parts for piece in part.norm_pieces(left_out)]
        (outer, outers), (inner, inners) = replica, self._group.replica
        rank, ranks = outer * inners + inner, outers * inners
        return pieces[len(pieces) * rank // ranks : len(pieces) * (rank + 1) // ranks]

    def scale_(self, factor: float) -> None:
        for part in self._parts:
            part.gradient.mul_(factor)

    def clamp_(self, limit: float) -> None:
        for part in self._parts:
            part.gradient.clamp_(-limit, limit)

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts, self._home, self._masters, self._tails = [], {}, {}, None
        if self._gathered:
            self._gathered.close()
        self._group.free()


def deals(
    part: Mapping[str, nn.Parameter], needs_whole: NeedsWhole, tied: Container[str]
) -> list[Deal]:
    """Return how each weight of a part is dealt out, in order."""

    def deal(name: str, shape: tuple[int, ...]) -> Deal:
        if not needs_whole(name, shape):
            return "even"
        # The leaves of a tied weight exchange gradients: each needs the same owner.
        return "first" if name in tied else "whole"

    return [deal(name, tuple(weight.shape)) for name, weight in part.items()]
