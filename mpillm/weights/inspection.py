"""Inspect tensors at rest: norms and largest values, and the differences of two sources."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mpillm.comm.failure import on_all
from mpillm.system.console import Progress
from mpillm.weights.saving import assign_writers
from mpillm.weights.slices import Box, run_boxes
from mpillm.weights.tensor_source import TensorInfo, TensorSource

if TYPE_CHECKING:
    from mpi4py import MPI

Figures = TypeVar("Figures")
# Elements of a tensor that are read at a time: bounded memory, and large reads.
PIECE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TensorFigures:
    """Figures of a tensor's values, over the elements that are numbers."""

    norm: float
    """The 2-norm."""
    largest: float
    """The largest magnitude."""
    not_finite: int
    """Elements that are NaN or infinite."""


@dataclass(frozen=True)
class Difference:
    """The difference of two tensors of one name and shape."""

    largest: float
    """The largest magnitude of an element's difference."""
    relative: float
    """The norm of the difference over the norm of the first; infinite where that is 0."""


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match one of `patterns` (`*` matches dots and slashes), in order; all
    without any pattern.
    """
    return [
        name
        for name in names
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def measure(
    source: TensorSource, names: Sequence[str], comm: "MPI.Intracomm", progress: Progress
) -> dict[str, TensorFigures]:
    """Measure the tensors `names`, each on one rank; return all figures on every rank.

    Every rank of `comm` calls it. Raises CheckpointError on all ranks where one cannot read.
    """

    def work() -> dict[str, TensorFigures]:
        found = {}
        for name in _share({name: source.tensors[name] for name in names}, comm):
            found[name] = _figures(source, name)
            progress.advance(source.tensors[name].nbytes)
        return found

    return _gathered(on_all(comm, work), names, comm)


def compare(
    one: TensorSource,
    other: TensorSource,
    names: Sequence[str],
    comm: "MPI.Intracomm",
    progress: Progress,
) -> dict[str, Difference]:
    """Compare the tensors `names`, which both sources have in one shape, as `measure` does."""

    def work() -> dict[str, Difference]:
        found = {}
        for name in _share({name: one.tensors[name] for name in names}, comm):
            found[name] = _difference(one, other, name)
            progress.advance(one.tensors[name].nbytes)
        return found

    return _gathered(on_all(comm, work), names, comm)


def _share(tensors: Mapping[str, TensorInfo], comm: "MPI.Intracomm") -> list[str]:
    """Return the names that this rank reads: ranks get about the same bytes."""
    sizes = {name: info.nbytes for name, info in tensors.items()}
    return assign_writers([sizes] * comm.size)[comm.rank]


def _gathered(
    own: Mapping[str, Figures], names: Sequence[str], comm: "MPI.Intracomm"
) -> dict[str, Figures]:
    every = {name: figures for part in comm.allgather(own) for name, figures in part.items()}
    return {name: every[name] for name in names}


def _boxes(shape: tuple[int, ...]) -> Iterable[Box]:
    count = math.prod(shape)
    for first in range(0, count, PIECE_ELEMENTS):
        yield from run_boxes(shape, first, min(PIECE_ELEMENTS, count - first))


def _figures(source: TensorSource, name: str) -> TensorFigures:
    squares, largest, not_finite = [], 0.0, 0
    for box in _boxes(source.tensors[name].shape):
        values = _wide(source.read(name, box))
        finite = values.isfinite()
        if not finite.all():
            not_finite += int((~finite).sum())
            values = values[finite]
        squares.append(float(torch.dot(values, values)))
        largest = max(largest, float(values.abs().max()) if len(values) else 0.0)
    return TensorFigures(math.sqrt(math.fsum(squares)), largest, not_finite)


def _difference(one: TensorSource, other: TensorSource, name: str) -> Difference:
    squares, differences, largest = [], [], 0.0
    for box in _boxes(one.tensors[name].shape):
        first, second = (_wide(source.read(name, box)) for source in (one, other))
        # Equal infinities, and NaN in both, differ by nothing.
        same = (first == second) | (first.isnan() & second.isnan())
        delta = torch.where(same, 0.0, first - second)
        squares.append(float(torch.dot(first, first)))
        differences.append(float(torch.dot(delta, delta)))
        largest = max(largest, float(delta.abs().nan_to_num(math.inf).max()))
    norm, distance = math.sqrt(math.fsum(squares)), math.sqrt(math.fsum(differences))
    relative = 0.0 if not distance else distance / norm if norm else math.inf
    return Difference(largest, relative)


def _wide(values: Tensor) -> Tensor:
    # float64: squares of float32 neither overflow nor underflow there.
    return values.flatten().double()
