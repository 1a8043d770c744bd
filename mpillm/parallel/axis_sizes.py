"""Choose and check the size of each mesh axis: plain numbers, on a login node without MPI."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType

from mpillm.comm.mesh import Axis, Mesh, describe
from mpillm.errors import LayoutError
from mpillm.models.spec import ModelSpec
from mpillm.parallel.context.context_axis import ContextAxis
from mpillm.parallel.data.data_axis import DataAxis
from mpillm.parallel.islands.island_axis import IslandAxis
from mpillm.parallel.parallel_axis import ParallelAxis
from mpillm.parallel.pipeline.pipeline_axis import PipelineAxis
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.tensor.tensor_axis import TensorAxis

AXES: tuple[ParallelAxis, ...] = (
    DataAxis(),
    IslandAxis(),
    PipelineAxis(),
    ContextAxis(),
    TensorAxis(),
)
"""Every axis, in the order in which a recipe and an error name them."""

# More would fill the screen: an error lists this many of the legal layouts.
SHOWN_LAYOUTS = 6


def mesh_sizes(
    settings: ParallelSettings, ranks: int, model: ModelSpec, batch: int
) -> dict[str, int]:
    """Return the size of each axis for a job of `ranks` and a batch of `batch` sequences.

    Raises LayoutError, with the legal layouts, where the settings do not fit.
    """
    wanted = {axis.name: axis.wanted(settings) for axis in AXES}
    # 0 means "what the other axes leave"; at most one axis may ask for it.
    fixed = math.prod(size for size in wanted.values() if size)
    sizes = {name: size or max(1, ranks // fixed) for name, size in wanted.items()}
    sizes = {axis.name: sizes[axis.name] for axis in AXES if _is_used(axis, sizes[axis.name])}
    used = tuple(axis for axis in AXES if axis.name in sizes)
    needed = math.prod(sizes.values())
    if needed == ranks:
        if faults := axis_faults(sizes, model, batch):
            raise LayoutError(f"{' and '.join(faults)}; {_remedy(used, ranks, model, batch)}")
        return sizes
    have = f"the job has {ranks}; {_remedy(used, ranks, model, batch)}"
    if 0 in wanted.values():
        below, above = ranks // fixed * fixed, (ranks // fixed + 1) * fixed
        starts = f"{below} or {above}" if below else f"{above}"
        asked = _product({name: size for name, size in wanted.items() if size and name in sizes})
        raise LayoutError(
            f"{asked} must divide the ranks, and {have}, or start with {starts} ranks"
        )
    raise LayoutError(
        f"{_product(sizes)} needs {needed} rank{'s' * (needed > 1)}, and {have}, "
        f"or start with {needed}"
    )


def _is_used(axis: ParallelAxis, size: int) -> bool:
    return size > 1 or not axis.optional


def _product(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"parallel.{name} = {size}" for name, size in sizes.items())


def axis_faults(sizes: Mapping[str, int], model: ModelSpec, batch: int) -> list[str]:
    """Return for each axis why its ranks cannot share the work; axes that fit are left out."""
    faults = [axis.fault(sizes.get(axis.name, 1), model, batch) for axis in AXES]
    shared, together = {name: sizes[name] for name in batch_axes(sizes)}, batch_share(sizes)[1]
    if not any(faults) and batch % together:
        faults.append(
            f"a global batch of {batch} sequences cannot be shared by {together} ranks "
            f"({describe(shared)})"
        )
    return [fault for fault in faults if fault]


def batch_axes(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the axes of a mesh of `sizes` whose ranks share the batch, the outermost
    first.
    """
    names = [axis.name for axis in AXES if axis.shares_batch and axis.name in sizes]
    return sorted(names, key=lambda name: name not in outermost_axes(sizes))


def batch_share(
    sizes: Mapping[str, int], places: Mapping[str, int] = MappingProxyType({})
) -> tuple[int, int]:
    """Return (i, n): the rank at `places` computes the i-th of n shares of a batch."""
    index, count = 0, 1
    for name in batch_axes(sizes):
        index, count = index * sizes[name] + places.get(name, 0), count * sizes[name]
    return index, count


def outermost_axes(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the axes whose ranks may hold other weights for some steps."""
    return [axis.name for axis in AXES if axis.trains_apart and axis.name in sizes]


def counts_loss(coordinates: Mapping[str, int]) -> bool:
    """Return whether the losses of the rank at `coordinates` (axis → index) count.

    Along an axis whose ranks repeat the losses, those of coordinate 0 alone count.
    """
    return all(coordinates.get(axis.name, 0) == 0 for axis in AXES if axis.repeats_loss)


def replicated_axes(mesh: Mesh) -> list[Axis]:
    """Return the axes of `mesh` along which ranks hold the same weights at any time."""
    names = [axis.name for axis in AXES if not (axis.cuts_weights or axis.trains_apart)]
    return [mesh.axis(name) for name in names if name in mesh.sizes]


def token_axes(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the axes of a mesh of `sizes` along which gradients are summed."""
    return [axis.name for axis in AXES if axis.shares_tokens and axis.name in sizes]


def legal_layouts(
    ranks: int, model: ModelSpec, batch: int, used: Sequence[ParallelAxis] | None = None
) -> list[dict[str, int]]:
    """Return all sizes of the axes that `ranks` ranks can have, those with the longest first axis
    first.

    `used`: the axes that the recipe names; None: all but islands.
    """
    every = [axis for axis in AXES if not axis.trains_apart]
    found = _factorisations(ranks, every if used is None else used)
    return [sizes for sizes in found if not axis_faults(sizes, model, batch)]


def _factorisations(ranks: int, axes: Sequence[ParallelAxis]) -> Iterator[dict[str, int]]:
    """Yield each way to write `ranks` as a product over `axes`; the first axis takes what the
    others leave.
    """
    # Every axis size divides the number of ranks.
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    first, *others = axes
    for sizes in product(divisors, repeat=len(others)):
        rest, remainder = divmod(ranks, math.prod(sizes))
        if rest and not remainder:
            names = (axis.name for axis in others)
            yield {first.name: rest, **dict(zip(names, sizes, strict=True))}


def _remedy(used: Sequence[ParallelAxis], ranks: int, model: ModelSpec, batch: int) -> str:
    legal = [describe(layout) for layout in legal_layouts(ranks, model, batch, used)]
    if not legal:
        shared = " and ".join(axis.shares(model, batch) for axis in used)
        return (
            f"no layout of {ranks} ranks shares {shared}: take a train.batch that {ranks} divides"
        )
    # The way to correct the job is part of the message: the layouts that would work.
    hidden = len(legal) - SHOWN_LAYOUTS
    shown = " or ".join(legal[:SHOWN_LAYOUTS]) + (f" (and {hidden} more)" if hidden > 0 else "")
    others = "pipeline leaves" if len(used) == 2 else "other axes leave"
    return f'take {shown} (parallel.data = "auto" takes what the {others})'
