"""List the competitors of a collective's benchmark: algorithms, the MPI library, torch, the memory
floor.

All private competitors use one pair of arrays and all node-shared ones another. Their order changes
from turn to turn, so no competitor finds its data in the cache more often than the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.bench.bench_options import MPI_LIBRARY, BenchOptions
from mpillm.bench.peers import PEERS, Peer
from mpillm.bench.sample_arrays import Shape, new_array
from mpillm.bench.timing import Call, Make
from mpillm.comm.algorithms.algorithm_catalog import ALGORITHM_CATALOG
from mpillm.comm.gpu.device_selection import WAYS
from mpillm.errors import MpillmError, UsageError

if TYPE_CHECKING:
    from mpillm.comm.communicator import Communicator
    from mpillm.comm.shared.team import SharedRows

FLOOR = "floor"
COPY, IN_PLACE = "copy", "pass in place"
SLOW = ("reference",)
# Every name that exists for some operation or machine: an unknown name is a typing error.
KNOWN = {
    "auto",
    MPI_LIBRARY,
    "reference",
    "shared",
    "segmented-ring",
    "two-level",
    *WAYS,
    *PEERS,
    *ALGORITHM_CATALOG,
}
SHARED_BY_DEFAULT = ("auto", "shared")
SHARED_PRIVATE = "shared, private"
"""The algorithm `shared` on private arrays: auto needs its cost where a program owns the arrays."""


def runnable(group: "Communicator", operation: str, options: BenchOptions) -> tuple[str, ...]:
    """List the algorithms that can run `operation` on the arrays asked for.

    Every rank of the group calls it.
    """
    on_gpu = options.device == "cuda"
    return group.algorithms(
        operation, new_array(0, options.element, options.device) if on_gpu else None
    )


def select(
    asked: tuple[str, ...], here: tuple[str, ...], note: Callable[[str], None], operation: str
) -> list[str]:
    """Select the names to measure from those that can run `here`: all but the slow reference by
    default.

    Raises UsageError for an unknown name; a known one that cannot run here becomes a note.
    """
    unknown = [name for name in asked if name not in KNOWN.union(here)]
    if unknown:
        raise UsageError(
            f"--algorithms {unknown[0]!r} is unknown; "
            f"for {operation} there are {', '.join((*here, *PEERS))}"
        )
    for name in asked:
        if name not in here and name not in PEERS:
            note(f"{operation} has no {name} on this job")
    return (
        [name for name in asked if name in here]
        if asked
        else [name for name in here if name not in SLOW]
    )


def peers_wanted(options: BenchOptions) -> tuple[str, ...]:
    """List the peers asked for; by default those that fit the device."""
    fitting = PEERS if options.device == "cuda" else PEERS[:1]
    return tuple(name for name in (options.algorithm_names or fitting) if name in PEERS)


class ArrayMemory:
    """Hold the arrays of one shape: a private pair and, where possible, a node-shared pair.

    Every rank makes it.
    """

    def __init__(self, group: "Communicator", shape: Shape, options: BenchOptions) -> None:
        self.shape, self._options = shape, options
        self._fresh = options.buffers == "fresh"
        self._rows: list[SharedRows | None] = []
        self._kept: dict[bool, tuple[Any, Any]] = {}
        counts = shape.counts()
        if (
            options.node_shared is not False
            and options.device == "cpu"
            and shape.count
            and shape.ranks > 1
        ):
            self._rows = [
                group.allocate(count, shape.element) if count else None for count in counts
            ]
        flats = [rows.buffer.flat if rows is not None else None for rows in self._rows]
        if flats and flats[0] is not None and (flats[1] is not None or not counts[1]):
            self._kept[True] = (flats[0], flats[1])

    def pair(self, algorithm: str) -> tuple[Any, Any]:
        """Give (source, target or None) for `algorithm`: new with `--buffers fresh`, else kept."""
        shared = self.is_shared(algorithm)
        if not shared and (self._fresh or False not in self._kept):
            source, target = self.shape.counts()
            new = (
                self._new(source),
                self._new(target) if target or not self.shape.same_array else None,
            )
            if self._fresh:
                return new
            self._kept[False] = new
        return self._kept[shared]

    def is_shared(self, algorithm: str) -> bool:
        wanted = self._options.node_shared
        return True in self._kept and (algorithm in SHARED_BY_DEFAULT if wanted is None else wanted)

    def _new(self, count: int) -> Any:
        return new_array(count, self.shape.element, self._options.device, self._fresh)

    def free(self) -> None:
        """Free the node-shared memory. Every rank calls it."""
        self._kept.clear()
        for rows in self._rows:
            if rows is not None:
                rows.free()


@dataclass(frozen=True)
class Competitor:
    """Hold one competitor: `prepare(source, target)` gives the call and the chosen algorithm's
    name.
    """

    name: str
    memory: ArrayMemory
    prepare: Callable[[Any, Any], tuple[Call, str]]
    synchronize: Callable[[], None] | None = None
    """On a GPU: return when the call's work is done."""

    def make(self) -> Call:
        """Prepare the call to be timed, on arrays that this rank has written."""
        source, target = self.memory.pair(self.name)
        if self.memory.shape.operation != "barrier":
            source[...] = 0
        call, _ = self.prepare(source, target)
        return self._finished(call)

    def try_out(self) -> tuple[Any, str]:
        """Call once on known data; give the result and the algorithm that was chosen."""
        shape = self.memory.shape
        source, target = self.memory.pair(self.name)
        shape.fill_source(source)
        if target is not None:
            target[...] = 0
        call, chosen = self.prepare(source, target)
        self._finished(call)()
        return shape.result(source, target), chosen

    def _finished(self, call: Call) -> Call:
        synchronize = self.synchronize
        if synchronize is None:
            return call

        def synchronized() -> None:
            call()
            synchronize()

        return synchronized


def competitors(
    group: "Communicator",
    peers: Mapping[str, Peer],
    memory: ArrayMemory,
    names: list[str],
    options: BenchOptions,
) -> dict[str, Competitor]:
    """Make a competitor for each of `names` and `peers`, in that order.

    By default the algorithm `shared` takes part twice: on node-shared and on private arrays.
    """
    shape, synchronize = memory.shape, _synchronizer(options.device)

    def ours(name: str) -> Callable[[Any, Any], tuple[Call, str]]:
        def prepare(source: Any, target: Any) -> tuple[Call, str]:
            prepared = group.prepare(
                shape.operation,
                source,
                None if shape.same_array else target,
                op=shape.op,
                root=shape.root,
                algorithm=name,
            )
            return prepared.bare if name == MPI_LIBRARY else prepared.run, prepared.algorithm

        return prepare

    def theirs(peer: Peer) -> Callable[[Any, Any], tuple[Call, str]]:
        return lambda source, target: (peer.prepare(shape, source, target), peer.name)

    found = {name: Competitor(name, memory, ours(name), synchronize) for name in names}
    if (
        "shared" in found
        and not options.algorithms
        and options.node_shared is None
        and memory.is_shared("shared")
    ):
        found[SHARED_PRIVATE] = Competitor(SHARED_PRIVATE, memory, ours("shared"), synchronize)
    return found | {
        name: Competitor(name, memory, theirs(peer), synchronize) for name, peer in peers.items()
    }


def floor(shape: Shape) -> Make:
    """Make the memory floor's call: every rank at once reads the whole array and writes as much.

    Out of place it is a warm copy. In place each number is overwritten, which moves less: a copy
    often fetches the cache lines that it overwrites. In place took half the time from 1 to 128 MiB.
    See `statistics.floor_share`.
    """
    source = np.ones(max(1, shape.nbytes // 8), np.uint64)
    if floor_kind(shape) == COPY:
        target = source.copy()
        return lambda: lambda: np.copyto(target, source)
    return lambda: lambda: np.invert(source, out=source)


def floor_kind(shape: Shape) -> str:
    return IN_PLACE if shape.same_array else COPY


def _synchronizer(device: str) -> Callable[[], None] | None:
    if device != "cuda":
        return None
    import torch

    return torch.cuda.synchronize


def tried(group: "Communicator", competitor: Competitor) -> tuple[str, str]:
    """Call `competitor` once: give the algorithm that it chose, and why it cannot run ("": it can).

    Every rank of the group calls it, and all agree.
    """
    chosen = reason = ""
    try:
        chosen = competitor.try_out()[1]
    # Ours raise MpillmError; torch has several classes for an operation that it lacks.
    except (MpillmError, RuntimeError, KeyError, ValueError) as failure:
        reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
    reasons: list[str] = group.comm.allgather(reason)
    return chosen, next((text for text in reasons if text), "")
