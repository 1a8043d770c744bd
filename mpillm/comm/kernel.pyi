"""The compiled kernel: arithmetic on rows of memory, and collectives in memory that the ranks of a node share.

`element` and `reduction` are indices into buffers.ELEMENTS and buffers.REDUCTIONS, `kind` into node.KINDS. Rows are
objects with the buffer protocol; their lengths are checked, and a mistake raises ValueError.
"""

import mmap
from typing import Any, TypeAlias

from numpy.typing import NDArray

Buffer: TypeAlias = NDArray[Any] | mmap.mmap

MOST_RANKS: int

class Operation:
    """One collective of a team, ready to run any number of times. Its buffers stay exported while it lives."""

    def run(self) -> None: ...
    def start(self) -> None: ...
    def test(self) -> bool: ...
    def wait(self) -> None: ...

class Team:
    """The ranks of one node. `processes`: their process ids, 0 for one that cannot be asked whether it lives."""

    def __init__(
        self, memory: Buffer, rank: int, size: int, stage_bytes: int, spins: int, processes: tuple[int, ...],
        error: type[Exception],
    ) -> None: ...  # fmt: skip
    def operation(
        self, kind: int, source: Buffer | None, target: Buffer | None, count: int, element: int, reduction: int,
        scale: float, root: int, flat: bool, source_rows: tuple[Buffer, ...] | None,
        target_rows: tuple[Buffer, ...] | None,
    ) -> Operation: ...  # fmt: skip

def combine(element: int, reduction: int, target: Buffer, source: Buffer, /) -> None: ...
def scale(element: int, target: Buffer, factor: float, /) -> None: ...
def widen(element: int, target: Buffer, source: Buffer, /) -> None: ...
def narrow(element: int, target: Buffer, source: Buffer, /) -> None: ...
def team_bytes(size: int, stage_bytes: int, /) -> int: ...
