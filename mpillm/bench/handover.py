"""Time a message alone and while its sender computes, by both ways of a ChannelSet and bare MPI."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpillm.bench.context import BenchContext
from mpillm.bench.overlap import computation
from mpillm.bench.point_to_point import Pair, pairs
from mpillm.bench.results import Row, Section, Show, figure, scaled, text, whole
from mpillm.bench.statistics import Seconds
from mpillm.bench.timing import Call, in_turn, interleave
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.clock_sync import clock_offset
from mpillm.comm.waiting import patient_bcast
from mpillm.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

# A pipeline stage computes at least as long as this, and no default size takes longer.
WORK_SECONDS = 10e-3
BARE_MPI = "mpi"
TAG = 73
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class MessagePath(Protocol):
    """Send messages of one length between the two ranks of a pair, in both directions."""

    def send(self, array: Bytes) -> None: ...
    def expect(self, array: Bytes) -> None: ...
    def wait(self) -> None: ...
    def finish(self) -> None:
        """Return when the sent message no longer needs its array."""

    def free(self) -> None: ...


class ChannelPath:
    """Send through a ChannelSet. Both ranks of `pair` make it.

    Raises CommError on both where they cannot use `way`.
    """

    def __init__(self, pair: "MPI.Intracomm", nbytes: int, way: str) -> None:
        self._channels = ChannelSet(pair, [Channel(0, 1, nbytes), Channel(1, 0, nbytes)], way=way)
        self._out, self._back = pair.rank, 1 - pair.rank
        self.finish, self.free = self._channels.drain, self._channels.free

    def send(self, array: Bytes) -> None:
        self._channels.send(self._out, array)

    def expect(self, array: Bytes) -> None:
        self._channels.post_receive(self._back, array)

    def wait(self) -> None:
        self._channels.wait(self._back)


class RequestPath:
    """Send by Isend, Irecv and Wait, without progress in between."""

    def __init__(self, pair: "MPI.Intracomm") -> None:
        self._pair, self._other = pair, 1 - pair.rank
        self._sent: MPI.Request
        self._expected: MPI.Request

    def send(self, array: Bytes) -> None:
        self._sent = self._pair.Isend(array, self._other, TAG)

    def expect(self, array: Bytes) -> None:
        self._expected = self._pair.Irecv(array, self._other, TAG)

    def wait(self) -> None:
        self._expected.Wait()

    def finish(self) -> None:
        self._sent.Wait()

    def free(self) -> None:
        """Free nothing: no request is persistent."""


def round_trip(path: MessagePath, leads: bool, outgoing: Bytes, incoming: Bytes) -> None:
    """Send a message and wait for one back."""
    path.expect(incoming)
    if leads:
        path.send(outgoing)
        path.wait()
    else:
        path.wait()
        path.send(outgoing)
    path.finish()


def while_computing(
    pair: "MPI.Intracomm",
    paths: Mapping[str, MessagePath],
    outgoing: Bytes,
    incoming: Bytes,
    iterations: int,
    warmup: int,
) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Time messages whose sender, rank 0, computes for WORK_SECONDS after it has sent.

    It makes no MPI call meanwhile. Gives two mappings of path to seconds (iterations,): from the
    send until rank 1 has the message, and of rank 0 in calls. Both ranks of `pair` call it.
    """
    from mpi4py import MPI

    names, unit, offset = list(paths), computation(WORK_SECONDS)[0], clock_offset(pair)
    # [0]: minus the send's time on rank 0, the arrival's time on rank 1: the sum is the latency.
    # [1]: the sender's seconds in calls.
    clock = np.zeros((2, len(names), warmup + iterations))
    for turn in range(warmup + iterations):
        for name in in_turn(names, turn):
            path, place = paths[name], (names.index(name), turn)
            if pair.rank:
                path.expect(incoming)
                pair.Barrier()
                path.wait()
                clock[0][place] = time.perf_counter() - offset
            else:
                pair.Barrier()
                begun, spent = _send_and_work(path, outgoing, unit)
                clock[0][place], clock[1][place] = offset - begun, spent
    taken = np.empty_like(clock)
    pair.Allreduce(clock, taken, MPI.SUM)
    arrival, sending = (dict(zip(names, part[:, warmup:], strict=True)) for part in taken)
    return arrival, sending


def _send_and_work(path: MessagePath, outgoing: Bytes, unit: Call) -> tuple[float, float]:
    """Send, compute, finish; give the time of the send and the seconds outside the computation."""
    begun = time.perf_counter()
    path.send(outgoing)
    sent = time.perf_counter()
    while time.perf_counter() < begun + WORK_SECONDS:
        unit()
    worked = time.perf_counter()
    path.finish()
    return begun, time.perf_counter() - worked + sent - begun


def run_handover(bench: BenchContext) -> list[Section]:
    """Measure pair by pair and size by size. Every rank calls it."""
    from mpi4py import MPI

    comm, sizes, rows = bench.comm, bench.options.sizes_of("handover"), list[Row]()
    chosen = pairs(bench.group.nodes)
    if not chosen:
        bench.note("handover needs two ranks; start with mpirun -n 2")
        return []
    with bench.progress("handover", len(chosen) * len(sizes)) as advance:
        for pair in chosen:
            member = comm.rank in (pair.first, pair.second)
            # The pair's first rank leads, whatever the ranks' order.
            joined = comm.Split(0 if member else MPI.UNDEFINED, int(comm.rank == pair.second))
            for size in sizes:
                found = _measure(bench, pair, joined, size) if member else None  # type: ignore[arg-type]
                more, note = patient_bcast(comm, found, pair.first) or ([], "")
                rows += more
                if note:
                    bench.note(note)
                advance()
            if member:
                joined.Free()
    title = (
        "handover: half a round trip; "
        f"a message whose sender then computes for {WORK_SECONDS * 1e3:.0f} ms"
    )
    return [Section("handover", title, rows, COLUMNS)]


def _measure(
    bench: BenchContext, pair: Pair, joined: "MPI.Intracomm", size: int
) -> tuple[list[Row], str]:
    """Measure one size: a row a way, and a note on the ways that failed.

    Both ranks of the pair call it.
    """
    rounds = bench.options.iterations, bench.options.warmup
    outgoing, incoming = np.ones(size, np.uint8), np.ones(size, np.uint8)
    paths, note = _open(pair, joined, size)
    calls = {
        name: lambda path=path: lambda: round_trip(path, joined.rank == 0, outgoing, incoming)
        for name, path in paths.items()
    }
    both = interleave(joined, calls, *rounds)
    computing, sending = while_computing(joined, paths, outgoing, incoming, *rounds)
    for path in paths.values():
        path.free()
    # The fastest way's half round trip: no message arrives earlier.
    soonest = min(float(np.median(seconds)) for seconds in both.values()) / 2
    rows: list[Row] = [
        {
            "level": pair.level,
            "pair": pair.text,
            "bytes": size,
            "way": name,
            **_quartiles("half_round_trip_seconds", both[name] / 2),
            **_quartiles("behind_work_seconds", computing[name]),
            "later_seconds": float(np.median(computing[name])) - soonest,
            **_quartiles("sender_seconds", sending[name]),
            "work_seconds": WORK_SECONDS,
        }
        for name in paths
    ]
    return rows, note


def _open(pair: Pair, joined: "MPI.Intracomm", size: int) -> tuple[dict[str, MessagePath], str]:
    paths: dict[str, MessagePath] = {}
    note = ""
    if pair.level == "node":
        try:
            paths["shared"] = ChannelPath(joined, size, "shared")
        except CommError as failure:
            note = f"handover has no shared: {failure}"
    return paths | {
        "messages": ChannelPath(joined, size, "messages"),
        BARE_MPI: RequestPath(joined),
    }, note


def _quartiles(key: str, seconds: Seconds) -> dict[str, float]:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {key: float(middle), f"{key}_q1": float(low), f"{key}_q3": float(high)}


def _spread(key: str) -> Show:
    """Show median and quartiles in µs."""
    return lambda row: "{} [{}..{}]".format(
        *(figure(row[name] * 1e6) for name in (key, f"{key}_q1", f"{key}_q3"))
    )


COLUMNS: dict[str, Show] = {
    "level": text("level"),
    "ranks": text("pair"),
    "bytes": whole("bytes"),
    "way": text("way"),
    "half a round trip µs": _spread("half_round_trip_seconds"),
    "overlapped µs": _spread("behind_work_seconds"),
    "added latency µs": scaled("later_seconds", 1e6),
    "sender µs": scaled("sender_seconds", 1e6),
}
