"""The compiled kernel: arithmetic on rows of memory; team collectives and SPSC queues.

`element` and `reduction` are indices into buffers.ELEMENTS and buffers.REDUCTIONS, `kind` into
shared.team.KINDS. Rows are objects with the buffer protocol. Lengths are checked, and a mistake
raises ValueError.
"""

import mmap
from collections.abc import Mapping
from typing import Any, TypeAlias

from numpy.typing import NDArray

Buffer: TypeAlias = NDArray[Any] | mmap.mmap

MOST_RANKS: int
SOURCE_HASH: str
WAITING: Mapping[str, float]
"""The constants of all waits, by their names in csrc/flags.h."""

class Operation:
    """One collective of a team, prepared for any number of runs. It holds its buffers' exports.

    `run` and `wait` raise the team's error for a rank that ended; so does `test` after a time in
    which nothing moved.
    """

    @property
    def queued(self) -> bool:
        """False: see executors.request.Request."""

    def run(self) -> None: ...
    def start(self) -> None: ...
    def test(self) -> bool: ...
    def wait(self) -> None: ...

class Team:
    """The ranks of one node. `processes`: their ids, 0 for a process that cannot be signalled."""

    def __init__(
        self,
        memory: Buffer,
        rank: int,
        size: int,
        staging_bytes: int,
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
    """One end of a single-producer, single-consumer queue of `slots` slots of `slot_bytes` each.

    `memory` has `spsc_queue_bytes`, zero at first and the same at both ends; one end `sends`, the
    other receives. One thread calls at a time. A wait raises `error` when `peer_process` has ended
    (0: a process that cannot be signalled). A message whose length is not the buffer's raises it.
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
        """Raise the error where the peer has ended and this end would wait without end."""

def combine(element: int, reduction: int, target: Buffer, source: Buffer, /) -> None: ...
def scale(element: int, target: Buffer, factor: float, /) -> None: ...
def widen(element: int, target: Buffer, source: Buffer, /) -> None: ...
def narrow(element: int, target: Buffer, source: Buffer, /) -> None: ...
def team_bytes(size: int, staging_bytes: int, /) -> int: ...
def spsc_queue_bytes(slots: int, slot_bytes: int, /) -> int: ...
