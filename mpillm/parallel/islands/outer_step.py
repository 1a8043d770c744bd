"""The outer step of islands: average their weights, and step on the common ones with momentum.

DiLoCo (Douillard et al. 2023, arXiv 2311.08105): an inner optimizer an island, and outside of it
SGD with Nesterov's momentum on the mean difference of a round.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import Communicator, silent
from mpillm.comm.mesh import Axis
from mpillm.comm.selection import Profile
from mpillm.parallel.data.same_weights import check_same
from mpillm.parallel.settings import ParallelSettings

# What one message holds, at most: the buffer is much smaller than a large model.
MESSAGE_BYTES = 32 << 20


class OuterStep:
    """The common weights of islands, and the steps on them.

    Every rank of `axis`, an island each, makes it with weights of the same shapes in the same
    order: what the optimizer steps on, whole or its shards. Weights are float32.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        axis: Axis,
        settings: ParallelSettings,
        profile: Profile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.axis, self._settings = axis, settings
        self._weights = {name: each for name, each in weights.items() if each.requires_grad}
        self._group = Communicator(axis.comm, profile=profile, warn=warn, node_map=axis.node_map)
        self._lower = settings.island_dtype != "float32"
        self.common: dict[str, Tensor] = {}
        """The weights at the end of the last round; empty until the first round begins."""
        self.momentum: dict[str, Tensor] = {}
        """The outer momentum of each weight; empty without one."""

    @property
    def has_momentum(self) -> bool:
        return self._settings.island_momentum > 0

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights, which are the same on all islands, as the common ones."""
        self.common = {name: weight.detach().clone() for name, weight in self._weights.items()}
        if self.has_momentum:
            self.momentum = {name: torch.zeros_like(each) for name, each in self.common.items()}

    @torch.no_grad()
    def take_common(self) -> None:
        """Overwrite the common weights by the weights, which are the same on all islands."""
        for name, weight in self._weights.items():
            self.common[name].copy_(weight)

    @torch.no_grad()
    def forget_round(self) -> None:
        """Overwrite the weights by the common ones."""
        for name, weight in self._weights.items():
            weight.copy_(self.common[name])

    def check_common(self) -> None:
        """Raise CommError where islands hold other common weights. Every rank calls it."""
        check_same(self.common.values(), self.axis)

    @torch.no_grad()
    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum float32 gradients over the islands, in place. Every rank of the axis calls it."""
        for buffer, parts in self._messages(gradients, torch.float32):
            for gradient, view in parts:
                view.copy_(gradient)
            self._group.allreduce(buffer, fixed_order=True)
            for gradient, view in parts:
                gradient.copy_(view)

    @torch.no_grad()
    def close_round(self) -> None:
        """Average the weights over the islands, step on the common ones, and take these.

        Every rank of the axis calls it.
        """
        rate, momentum = self._settings.island_rate, self._settings.island_momentum
        names = {id(weight): name for name, weight in self._weights.items()}
        dtype = torch.bfloat16 if self._lower else torch.float32
        for buffer, parts in self._messages(list(self._weights.values()), dtype):
            for weight, view in parts:
                # In float32 the weights themselves: their sum needs no rounding of differences.
                common = self.common[names[id(weight)]]
                view.copy_(weight - common if self._lower else weight)
            # In one order: all islands get the same bits, and so stay the same.
            self._group.allreduce(buffer, fixed_order=True)
            for weight, view in parts:
                common = self.common[names[id(weight)]]
                mean = view.float() / self.axis.size
                if self._lower:
                    mean += common
                difference = common - mean
                # common − rate · (difference + momentum · sum), written from the mean: with rate 1
                # and no momentum the result is the mean, bit for bit.
                step = mean.add(difference, alpha=1 - rate)
                if self.has_momentum:
                    average = self.momentum[names[id(weight)]]
                    average.mul_(momentum).add_(difference)
                    step.sub_(average, alpha=rate * momentum)
                common.copy_(step)
                weight.copy_(step)

    def _messages(
        self, tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield buffers of at most MESSAGE_BYTES, each with (tensor, its view of the buffer).

        A tensor that is larger has a buffer of its own.
        """
        groups: list[list[Tensor]] = []
        filled = math.inf
        for tensor in tensors:
            nbytes = tensor.numel() * dtype.itemsize
            if filled + nbytes > MESSAGE_BYTES:
                groups.append([])
                filled = 0
            groups[-1].append(tensor)
            filled += nbytes
        for group in groups:
            sizes = [tensor.numel() for tensor in group]
            buffer = torch.empty(sum(sizes), dtype=dtype, device=group[0].device)
            views = torch.split(buffer, sizes)
            pairs = zip(group, views, strict=True)
            yield buffer, [(tensor, view.view(tensor.shape)) for tensor, view in pairs]

    def close(self) -> None:
        """Free communicators and shared memory; every rank calls it."""
        self._group.free()
