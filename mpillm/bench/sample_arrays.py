"""Arrays to measure with: of any element type, on the CPU or a GPU, new or kept, private or node-shared."""

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.bench.pattern import fill, pattern
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import from_octets, itemsize_of, new_octets

IN_BLOCKS = ("reduce_scatter", "allgather", "alltoall")
"""The operations that cut the array in equal blocks, one a rank."""


@dataclass(frozen=True)
class Shape:
    """What one collective works on: `count` elements of the whole array, its result in place or in another array."""

    operation: str
    count: int
    element: str
    ranks: int
    rank: int
    in_place: bool
    op: str = "sum"
    root: int = 0

    @property
    def nbytes(self) -> int:
        return self.count * itemsize_of(self.element)

    @property
    def bounds(self) -> list[int]:
        return block_bounds(self.count, self.ranks)

    @property
    def same_array(self) -> bool:
        """A broadcast and a barrier have no other array, whatever was asked."""
        return self.in_place or self.operation in ("broadcast", "barrier")

    def counts(self) -> tuple[int, int]:
        """Elements of the source, and of the result where it is another array."""
        own = self.bounds[self.rank + 1] - self.bounds[self.rank]
        if self.same_array:
            return self.count, 0
        source = own if self.operation == "allgather" else self.count
        return source, own if self.operation == "reduce_scatter" else self.count

    def fill_source(self, source: Any) -> None:
        """Write this rank's data; in place every block but the own one is then another rank's to replace."""
        first = (
            self.bounds[self.rank] if self.operation == "allgather" and not self.same_array else 0
        )
        fill(source, pattern(self.rank, self.ranks, self.element, self.op), first)

    def result(self, source: Any, target: Any) -> Any:
        """Where the result lies: of an in-place reduce-scatter the own block."""
        if not self.same_array:
            return target
        if self.operation == "reduce_scatter":
            return source[self.bounds[self.rank] : self.bounds[self.rank + 1]]
        return source


def fitting_count(operation: str, nbytes: int, element: str, ranks: int) -> int:
    """Elements in `nbytes`, at least one; where the array is cut in equal blocks a multiple of `ranks`."""
    block = ranks if operation in IN_BLOCKS else 1
    return max(1, nbytes // itemsize_of(element) // block) * block


def new_array(count: int, element: str, device: str, pages: bool = False) -> Any:
    """A flat array from a page's beginning on, its contents undefined: NumPy's, or torch's for bfloat16 and on a GPU.

    `pages`: from pages that no one has touched, whatever malloc has kept; not on a GPU.
    """
    if device == "cuda":
        import torch

        return torch.empty(count, dtype=getattr(torch, element), device="cuda")
    nbytes = count * itemsize_of(element)
    raw = (
        np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8, nbytes)
        if pages
        else new_octets(nbytes)
    )
    return from_octets(raw, element).flat


def as_tensor(array: Any) -> Any:
    """The same memory as a torch tensor."""
    if not isinstance(array, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)
