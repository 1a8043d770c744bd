"""Slices: boxes of whole tensors, in which every layout gives its tensors to a checkpoint.

A box is a start and a size along each dim. In the row-major order of the whole tensor it may be one
contiguous run of elements, and then it is stored and read as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
# HDF5 has no bfloat16: its two bytes are stored, and the index names the dtype.
STORED_AS = {torch.bfloat16: torch.int16}


class Box(NamedTuple):
    """The elements start[d] … start[d] + size[d] - 1 along each dim d of a tensor."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.size)

    def common(self, other: "Box") -> "Box | None":
        """Intersect two boxes of one tensor; None where they share no element."""
        start = tuple(map(max, self.start, other.start))
        ends = (
            min(a + m, b + n)
            for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(end - first for first, end in zip(start, ends, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Box") -> tuple[Any, ...]:
        """Index this box in an array that holds `outer`, which contains it."""
        cuts = zip(self.start, outer.start, self.size, strict=True)
        # The ellipsis makes a view of a scalar, too, where an empty index would copy it.
        return (*(slice(a - b, a - b + n) for a, b, n in cuts), ...)

    def span(self, outer: "Box") -> tuple[int, int]:
        """Number the first and the last + 1 of this box's elements in row-major order of `outer`.

        The span has as many elements as the box exactly where the box is a contiguous run of it.
        """
        if not self.numel:
            return 0, 0
        first = last = 0
        for a, b, n, width in zip(self.start, outer.start, self.size, outer.size, strict=True):
            first, last = first * width + a - b, last * width + a - b + n - 1
        return first, last + 1


def whole_box(shape: Sequence[int]) -> Box:
    """Make the box that is all of a tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def run_boxes(shape: Sequence[int], first: int, count: int) -> list[Box]:
    """Cut a run of elements of a row-major tensor into boxes, in the order of the run.

    `first`, `count`: in elements. A run of an n-dim tensor needs at most 2n - 1 boxes, each of
    which is a contiguous run itself.
    """
    if not shape:
        return [Box((), ())] if count else []
    inner = math.prod(shape[1:])
    if not count or not inner:
        return []
    row, skipped = divmod(first, inner)
    boxes = []
    if skipped or count < inner:
        # The run begins, or begins and ends, inside of a row.
        part = min(count, inner - skipped)
        rest = run_boxes(shape[1:], skipped, part)
        boxes += [Box((row, *box.start), (1, *box.size)) for box in rest]
        row, count = row + 1, count - part
    if rows := count // inner:
        boxes.append(Box((row, *(0 for _ in shape[1:])), (rows, *shape[1:])))
    if left := count - rows * inner:
        rest = run_boxes(shape[1:], 0, left)
        boxes += [Box((row + rows, *box.start), (1, *box.size)) for box in rest]
    return boxes


@dataclass(frozen=True)
class TensorSlice:
    """A tensor that is the box at `start` of a whole tensor of shape `shape`."""

    tensor: Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        return Box(self.start, tuple(self.tensor.shape))


# What a rank holds of one whole tensor: all of it, one box, or several boxes.
Held = Tensor | TensorSlice | Sequence[TensorSlice]


def slices_of(held: Held) -> Sequence[TensorSlice]:
    """List the slices of what a rank holds; a plain tensor is a whole one."""
    if isinstance(held, Tensor):
        return (TensorSlice(held, (0,) * held.dim(), tuple(held.shape)),)
    return (held,) if isinstance(held, TensorSlice) else held


def split_run(flat: Tensor, first: int, shape: Sequence[int]) -> list[TensorSlice]:
    """Cut `flat` (1-dim), the elements from `first` on of a whole tensor, into slices that share
    its memory: for layouts that shard flattened tensors (ZeRO).
    """
    slices, done = [], 0
    for box in run_boxes(shape, first, flat.numel()):
        part = flat[done : done + box.numel].view(box.size)
        slices.append(TensorSlice(part, box.start, tuple(shape)))
        done += box.numel
    return slices


def raw(tensor: Tensor) -> tuple[str, Array]:
    """Name a CPU tensor's dtype as the index does (`float32`), and share its memory with NumPy.

    Reading into the array fills the tensor.
    """
    tensor = tensor.detach()
    stored = tensor.view(STORED_AS.get(tensor.dtype, tensor.dtype)).numpy()
    return str(tensor.dtype).removeprefix("torch."), stored


def stored_dtype(tensor: Tensor) -> tuple[str, np.dtype[Any]]:
    """Name a tensor's dtype as the index does, and the dtype in which a file holds its values."""
    stored = torch.empty((), dtype=STORED_AS.get(tensor.dtype, tensor.dtype)).numpy().dtype
    return str(tensor.dtype).removeprefix("torch."), stored


def all_finite(tensor: Tensor) -> bool:
    """Return whether the tensor holds neither NaN nor an infinity, in one pass over it."""
    if not tensor.dtype.is_floating_point:
        return True
    # A sum needs no memory of its own and keeps each NaN. Large values may overflow it, so only
    # then each element is tested.
    values = tensor.detach()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
