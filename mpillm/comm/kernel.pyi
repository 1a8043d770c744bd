"""The compiled kernel: arithmetic on rows of memory; collectives and messages in memory that the ranks of a node share.

`element` and `reduction` are indices into buffers.ELEMENTS and buffers.REDUCTIONS, `kind` into node.KINDS. Rows are
objects with the buffer protocol; their lengths are checked, and a mistake raises ValueError.
"""

import mmap
from typing import Any, TypeAlias

from numpy.typing import NDArray

Buffer: TypeAlias = NDArray[Any] | mmap.mmap

MOST_RANKS: int
SOURCE_HASH: str

class Operation:
    """One collective of a team, ready to run any number of times. Its buffers stay exported while it lives.

    `run`, `wait` and, where it finds nothing to do for a while, `test` raise the team's error for a rank that ended.
    """

    def run(self) -> None: ...
    def start(self) -> None: ...
    def test(self) -> bool: ...
    def wait(self) -> None: ...

class Team:
    """The ranks of one node. `processes`: their process ids, 0 for one that cannot be asked whether it lives."""

    def __init__(
        self,
        memory: Buffer,
        rank: int,
        size: int,
        stage_bytes: int,
        spins: int,
        processes: tuple[int, ...],
        error: type[Exception],
    ) -> None: ...
    def operation(
        self,
        kind: int,
        source: Buffer | None,
        target: Buffer | None,
        count: int,
        element: int,
        reduction: int,
        scale: float,
        root: int,
        flat: bool,
        source_rows: tuple[Buffer, ...] | None,
        target_rows: tuple[Buffer, ...] | None,
    ) -> Operation: ...

class SpscQueue:
    """One end of a way for messages from one process to another, through `slots` slots of `slot_bytes` each.

    `memory` holds `spsc_queue_bytes`, zero at first and the same at both ends; one end `sends`, the other receives. One
    thread calls at a time. What waits raises `error` when the process `peer_process` (0: it can't be asked) is gone;
    what meets a message of another length than its buffer's raises it too.
    """

    def __init__(
        self,
        memory: Buffer,
        slots: int,
        slot_bytes: int,
        sends: bool,
        peer_rank: int,
        peer_process: int,
        spins: int,
        error: type[Exception],
    ) -> None: ...
    def try_send(self, buffer: Buffer, /) -> bool: ...
    def send(self, buffer: Buffer, limit_seconds: float = ..., /) -> bool: ...
    def try_receive(self, buffer: Buffer, /) -> bool: ...
    def receive(self, buffer: Buffer, limit_seconds: float = ..., /) -> bool: ...
    def check(self) -> None:
        """Raise where the peer is gone and this end would wait for ever."""

def combine(element: int, reduction: int, target: Buffer, source: Buffer, /) -> None: ...
def scale(element: int, target: Buffer, factor: float, /) -> None: ...
def widen(element: int, target: Buffer, source: Buffer, /) -> None: ...
def narrow(element: int, target: Buffer, source: Buffer, /) -> None: ...
def team_bytes(size: int, stage_bytes: int, /) -> int: ...
def spsc_queue_bytes(slots: int, slot_bytes: int, /) -> int: ...
