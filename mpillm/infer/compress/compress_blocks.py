"""Compress the linear layers of a model, block by block: each layer is solved by one rank.

A block is computed on the calibration data twice: as it was, for the statistics of its layers'
inputs, then compressed, so that the next block sees the errors ahead of it (Frantar et al. 2022).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpillm.comm.failure import on_all
from mpillm.errors import CheckpointError
from mpillm.infer.compress.compression_method import CompressionMethod, Solved
from mpillm.infer.compress.fold_scales import fold_of
from mpillm.infer.compress.input_statistics import (
    Groups,
    InputStatistics,
    assign_owners,
    group_layers,
    watch,
)
from mpillm.models.adapt import block_layers
from mpillm.models.layers.stored.stored_codes import StoredCodes
from mpillm.models.part_module import Fields, PartModule
from mpillm.models.tuning import ROUTERS
from mpillm.system.console import Console

if TYPE_CHECKING:
    from mpi4py import MPI

Given = tuple[Any, ...]


class BlockInputs:
    """The stream ahead of the next block, of each batch of this rank, with the other arguments."""

    def __init__(self, model: PartModule, batches: Sequence[Fields]) -> None:
        blocks = dict(model.numbered_blocks())
        self._streams: list[Tensor] = []
        self._others: list[dict[int, Given]] = []
        for fields in batches:
            with _without_blocks(blocks) as seen:
                model.forward_part(fields, ())
            self._streams.append(seen[min(blocks)][0])
            self._others.append({number: given[1:] for number, given in seen.items()})

    def __len__(self) -> int:
        return len(self._streams)

    def run(self, number: int, block: nn.Module, batch: int) -> Tensor:
        """Return the output of a block on a batch."""
        made = block(self._streams[batch], *self._others[batch][number])
        found: Tensor = made if isinstance(made, Tensor) else made[0]
        return found

    def advance(self, number: int, block: nn.Module) -> None:
        """Replace the streams by the outputs of a block."""
        for batch in range(len(self)):
            self._streams[batch] = self.run(number, block, batch)


@contextmanager
def _without_blocks(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Given]]:
    """Let each block return its stream; yield what each is called with."""
    seen: dict[int, Given] = {}

    def passing(number: int) -> Any:
        def forward(*given: Any) -> Any:
            seen[number] = given
            return given[0]

        return forward

    try:
        for number, block in blocks.items():
            block.forward = passing(number)
        yield seen
    finally:
        for block in blocks.values():
            del block.forward


def compressible(model: PartModule) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name, but those that choose experts."""
    layers = block_layers(model)
    return {name: each for name, each in layers if name.rpartition(".")[2] not in ROUTERS}


def check_layers(model: PartModule, method: CompressionMethod) -> None:
    """Raise UsageError and MismatchError where the model or a layer does not fit the method."""
    method.check_model(model.spec)
    for name, layer in compressible(model).items():
        if method.reads(name):
            method.check_layer(name, (layer.out_features, layer.in_features))


@torch.no_grad()
def compress_blocks(
    model: PartModule,
    method: CompressionMethod,
    batches: Sequence[Fields],
    comm: "MPI.Intracomm",
    console: Console,
) -> dict[str, StoredCodes]:
    """Compress the layers of `model` in place; return the stored weights by the layers' names.

    `batches`: this rank's share of the calibration data. Every rank calls it with the same model,
    and ends with the same one. The dense weights are replaced by what the stored ones mean. Raises
    UsageError where a layer does not fit the method.
    """
    layers, kept = compressible(model), dict[str, StoredCodes]()
    check_layers(model, method)
    blocks = dict(model.numbered_blocks())
    inputs = on_all(comm, lambda: BlockInputs(model, batches)) if method.needs_data else None
    with console.progress(method.name, len(blocks), "blocks") as progress:
        for number, block in blocks.items():
            inside = set(block.modules())
            own = {name: layer for name, layer in layers.items() if layer in inside}
            for name, solved in _solve_block(number, block, own, method, inputs, comm).items():
                if isinstance(solved, StoredCodes):
                    kept[name] = solved
                parent = model.get_submodule(name.rpartition(".")[0])
                method.apply(parent, layers[name], solved)
            if inputs is not None:
                on_all(comm, lambda n=number, b=block: inputs.advance(n, b))  # type: ignore[misc]
            progress.advance()
    return kept


def _solve_block(
    number: int,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    method: CompressionMethod,
    inputs: BlockInputs | None,
    comm: "MPI.Intracomm",
) -> dict[str, Solved]:
    """Solve the layers of a block, a group of those that share inputs on a rank; return all."""
    groups: Groups = {name: [name] for name in layers}
    statistics: dict[str, InputStatistics] = {}
    if inputs is not None:
        groups, statistics = _watch_block(number, block, layers, method, inputs, comm)
    owners = assign_owners(groups, layers, comm.size)
    for first, each in statistics.items():
        each.reduce(owners[first], comm)
    _smooth_block(block, layers, method, groups, statistics, owners, comm)

    def solve() -> dict[str, Solved]:
        return {
            name: method.solve(layers[name].weight.detach(), statistics.get(first))
            for first, names in groups.items()
            if owners[first] == comm.rank
            for name in names
            if method.reads(name)
        }

    found: dict[str, Solved] = {}
    for share in comm.allgather(on_all(comm, solve)):
        found |= share
    return {name: found[name] for name in layers if name in found}


def _watch_block(
    number: int,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    method: CompressionMethod,
    inputs: BlockInputs,
    comm: "MPI.Intracomm",
) -> tuple[Groups, dict[str, InputStatistics]]:
    """Run the block over this rank's batches; return its groups of layers and their inputs."""

    def find() -> Groups:
        return group_layers(layers, lambda: inputs.run(number, block, 0)) if len(inputs) else {}

    # A rank without a batch learns the groups from another.
    groups = next(found for found in comm.allgather(on_all(comm, find)) if found)

    def run() -> dict[str, InputStatistics]:
        with ExitStack() as stack:
            found = watch(layers, groups, method.needs_products, stack)
            for batch in range(len(inputs)):
                inputs.run(number, block, batch)
        for first, each in found.items():
            if not each.squares_I.isfinite().all():
                raise CheckpointError(
                    f"the inputs of {first} are not finite on the calibration data: the model "
                    "diverged; name an earlier checkpoint"
                )
        return found

    return groups, on_all(comm, run)


def _smooth_block(
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    method: CompressionMethod,
    groups: Groups,
    statistics: dict[str, InputStatistics],
    owners: Mapping[str, int],
    comm: "MPI.Intracomm",
) -> None:
    """Move factors from inputs into weights, where the method has some and they can be moved."""
    folds = {
        first: fold_of(block, [layers[name] for name in groups[first]]) for first in statistics
    }

    def find() -> dict[str, Tensor]:
        found = {}
        for first, fold in folds.items():
            if owners[first] == comm.rank and fold is not None:
                weights = [layers[name].weight.detach() for name in groups[first]]
                factor_I = method.smooth(weights, statistics[first])
                if factor_I is not None:
                    found[first] = factor_I
        return found

    factors: dict[str, Tensor] = {}
    for share in comm.allgather(on_all(comm, find)):
        factors |= share
    # In the order of the groups: that of ranks would round otherwise at another number of them.
    for first in groups:
        fold = folds.get(first)
        if first not in factors or fold is None:
            continue
        fold(factors[first])
        for name in groups[first]:
            layers[name].weight.mul_(factors[first])
        statistics[first] = statistics[first].divided(factors[first])
