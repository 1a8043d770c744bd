"""Statistics of the inputs of linear layers over calibration data, summed over ranks.

Shapes: N positions, I inputs.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class InputStatistics:
    """Of the inputs that one or several layers read."""

    count: int
    """Positions."""
    squares_I: Tensor
    """Sums of squares, float64."""
    largest_I: Tensor
    """The largest magnitudes, float64."""
    products_II: Tensor | None
    """X · Xᵀ, float64; None: not asked for."""

    @classmethod
    def empty(cls, inputs: int, products: bool) -> "InputStatistics":
        zeros_I = torch.zeros(inputs, dtype=torch.float64)
        whole = torch.zeros(inputs, inputs, dtype=torch.float64) if products else None
        return cls(0, zeros_I, zeros_I.clone(), whole)

    def add(self, x: Tensor) -> None:
        """Count inputs (…, I).

        Products of a batch are float32, sums of batches float64: these are the same in any order
        but for the last of 53 bits, so that the number of ranks does not matter.
        """
        x_NI = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x_NI):
            return
        self.count += len(x_NI)
        self.largest_I = torch.maximum(self.largest_I, x_NI.abs().amax(0).double())
        if self.products_II is None:
            self.squares_I += x_NI.square().sum(0).double()
        else:
            products_II = (x_NI.t() @ x_NI).double()
            self.products_II += products_II
            self.squares_I += products_II.diagonal()

    def reduce(self, owner: int, comm: "MPI.Intracomm") -> None:
        """Sum over ranks; the result is on rank `owner`. Every rank calls it."""
        from mpi4py import MPI

        self.count = comm.allreduce(self.count)
        sums = [(self.squares_I, MPI.SUM), (self.largest_I, MPI.MAX)]
        if self.products_II is not None:
            sums.append((self.products_II, MPI.SUM))
        for tensor, operation in sums:
            array = tensor.numpy()
            own = MPI.IN_PLACE if comm.rank == owner else array
            comm.Reduce(own, array if comm.rank == owner else np.empty(0), operation, owner)

    def divided(self, factor_I: Tensor) -> "InputStatistics":
        """Return those of the inputs divided by factors."""
        factor_I = factor_I.double()
        products_II = self.products_II
        if products_II is not None:
            products_II = products_II / factor_I / factor_I[:, None]
        return InputStatistics(
            self.count, self.squares_I / factor_I**2, self.largest_I / factor_I, products_II
        )


Groups = dict[str, list[str]]
"""The layers that share inputs: by the name of the first."""


def group_layers(layers: Mapping[str, nn.Linear], run: Any) -> Groups:
    """Find the layers whose inputs are one tensor; `run()` computes the block once."""
    owner_of: dict[int, str] = {}
    alive: list[Tensor] = []
    groups: Groups = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            # Kept, so that no other tensor gets its identity.
            alive.append(given[0])
            first = owner_of.setdefault(id(given[0]), name)
            groups.setdefault(first, []).append(name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        run()
    return groups


def watch(
    layers: Mapping[str, nn.Linear], groups: Groups, products: bool, stack: ExitStack
) -> dict[str, InputStatistics]:
    """Collect the statistics of each group while `stack` is open."""
    found = {first: InputStatistics.empty(layers[first].in_features, products) for first in groups}
    for first, statistics in found.items():

        def hook(_: nn.Module, given: tuple[Any, ...], into: InputStatistics = statistics) -> None:
            into.add(given[0])

        stack.callback(layers[first].register_forward_pre_hook(hook).remove)
    return found


def assign_owners(groups: Groups, layers: Mapping[str, nn.Linear], ranks: int) -> dict[str, int]:
    """Assign each group to a rank, the costliest first, to the one with the least to do.

    Costs are those of a solve by columns: outputs × inputs².
    """
    costs = {
        first: sum(layers[name].out_features for name in names) * layers[first].in_features ** 2
        for first, names in groups.items()
    }
    loads: Sequence[int] = [0] * ranks
    loads = list(loads)
    owners = {}
    for first in sorted(costs, key=lambda each: (-costs[each], each)):
        owner = loads.index(min(loads))
        owners[first] = owner
        loads[owner] += costs[first]
    return owners
