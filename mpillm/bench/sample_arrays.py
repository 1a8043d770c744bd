"""Make the arrays of a benchmark: any element type, on the CPU or a GPU, new or kept.

Sizes that the node has no memory for are refused first: Linux grants more memory than there is, and
ends the process at the first write into it.
"""

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.bench.bench_options import COLLECTIVES, BenchOptions
from mpillm.bench.pattern import fill, pattern
from mpillm.comm.algorithms.schedule import block_bounds
from mpillm.comm.buffers import from_octets, itemsize_of, new_octets
from mpillm.errors import UsageError
from mpillm.machine.memory import read_memory
from mpillm.machine.node_map import NodeMap
from mpillm.system.console import binary_bytes, counted

if TYPE_CHECKING:
    from mpi4py import MPI

# Arrays of the largest size that a rank holds at once, at least.
ARRAYS = {**dict.fromkeys(COLLECTIVES, 2), "memory": 3, "filesystem": 1}
OTHERS = 2
GEMM_MATRICES = 3
# Where Linux does not say: nothing is refused.
UNKNOWN = 1 << 62
IN_BLOCKS = ("reduce_scatter", "allgather", "alltoall")
"""The operations that cut the array in equal blocks, one a rank."""


@dataclass(frozen=True)
class Shape:
    """Describe one collective: `count` elements of the whole array, in place or into another."""

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
        """True in place; a broadcast and a barrier have no other array."""
        return self.in_place or self.operation in ("broadcast", "barrier")

    def counts(self) -> tuple[int, int]:
        """Give the elements of the source, and of the result where it is another array."""
        own = self.bounds[self.rank + 1] - self.bounds[self.rank]
        if self.same_array:
            return self.count, 0
        source = own if self.operation == "allgather" else self.count
        return source, own if self.operation == "reduce_scatter" else self.count

    def fill_source(self, source: Any) -> None:
        """Write this rank's data; in place the other ranks replace every block but the own."""
        first = (
            self.bounds[self.rank] if self.operation == "allgather" and not self.same_array else 0
        )
        fill(source, pattern(self.rank, self.ranks, self.element, self.op), first)

    def result(self, source: Any, target: Any) -> Any:
        """Give the array of the result: of an in-place reduce-scatter the own block."""
        if not self.same_array:
            return target
        if self.operation == "reduce_scatter":
            return source[self.bounds[self.rank] : self.bounds[self.rank + 1]]
        return source


def fitting_count(operation: str, nbytes: int, element: str, ranks: int) -> int:
    """Count the elements in `nbytes`, at least one; a multiple of `ranks` for equal blocks."""
    block = ranks if operation in IN_BLOCKS else 1
    return max(1, nbytes // itemsize_of(element) // block) * block


def new_array(count: int, element: str, device: str, pages: bool = False) -> Any:
    """Make a flat, page-aligned array with undefined contents.

    It is NumPy's, or torch's for bfloat16 and on a GPU. `pages`: on fresh pages, whatever malloc
    keeps; not on a GPU.
    """
    if device == "cuda":
        import torch

        return torch.empty(count, dtype=getattr(torch, element), device="cuda")
    nbytes = count * itemsize_of(element)
    # mmap instead of malloc: malloc may reuse pages that are mapped already.
    raw = (
        np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8, nbytes)
        if pages
        else new_octets(nbytes)
    )
    return from_octets(raw, element).flat


def as_tensor(array: Any) -> Any:
    """View the same memory as a torch tensor."""
    if not isinstance(array, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)


def check_memory(options: BenchOptions, comm: "MPI.Intracomm", node_map: NodeMap) -> None:
    """Raise UsageError where the arrays of a node's ranks exceed its memory. Every rank calls it.

    Arrays on a GPU are left to its own library, which refuses them.
    """
    if options.device != "cpu":
        return
    local = len(node_map.local_ranks(comm.rank))
    # Every rank raises where one node has too little.
    least = min(comm.allgather((read_memory().usable or UNKNOWN) // local))
    for what in options.benchmarks():
        needed = needed_bytes(options, what)
        if needed > least:
            raise UsageError(
                f"bench {what} with sizes up to {options.sizes_of(what)[-1]:,} needs "
                f"{binary_bytes(needed)} a rank at least, and a node has {binary_bytes(least)} "
                f"available for each of its {counted(local, 'rank')}; "
                "write smaller --sizes or start fewer ranks a node"
            )


def needed_bytes(options: BenchOptions, what: str) -> int:
    """Estimate the bytes of a rank's arrays for the largest size, rather too few than too many."""
    largest = options.sizes_of(what)[-1]
    if what == "gemm":
        return GEMM_MATRICES * largest * largest * itemsize_of(options.element)
    if what == "barrier":
        return 0
    return ARRAYS.get(what, OTHERS) * largest
