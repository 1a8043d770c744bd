"""Measure messages between two ranks as OSU does: latency, bandwidth, both ways, message rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.bench import statistics
from mpillm.bench.context import BenchContext
from mpillm.bench.results import TIME_COLUMNS, Row, Section, Show, scaled, text, whole
from mpillm.bench.statistics import Seconds
from mpillm.bench.timing import batch_of
from mpillm.comm.waiting import patient_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

WINDOW = 64
"""Messages in flight at once, as in osu_bw; fewer where they would exceed WINDOW_BYTES."""
WINDOW_BYTES = 256 << 20
# Two tags, so that an answer never matches a receive of data.
TAG, ANSWER = 71, 72
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Pair:
    """Two ranks and the `level` between them: "node" or "network"."""

    level: str
    first: int
    second: int

    @property
    def text(self) -> str:
        return f"{self.first}–{self.second}"


def pairs(nodes: list[list[int]]) -> list[Pair]:
    """Choose a pair in the first node with two ranks, and one between the first two nodes."""
    inside = [Pair("node", *ranks[:2]) for ranks in nodes if len(ranks) > 1][:1]
    return inside + ([Pair("network", nodes[0][0], nodes[1][0])] if len(nodes) > 1 else [])


def many_pairs(nodes: list[list[int]], ranks: int) -> list[Pair]:
    """Pair each rank of the first half with one of the second, as in osu_mbw_mr."""
    node_of = {rank: number for number, members in enumerate(nodes) for rank in members}
    half = ranks // 2
    return [
        Pair("node" if node_of[rank] == node_of[rank + half] else "network", rank, rank + half)
        for rank in range(half)
    ]


def ping_pong(comm: "MPI.Intracomm", peer: int, leads: bool, memory: Bytes, batch: int) -> float:
    """Time half a round trip in seconds, over `batch` round trips."""
    from mpi4py import MPI

    message, send, receive = [memory, MPI.BYTE], comm.Send, comm.Recv
    started = time.perf_counter()
    for _ in range(batch):
        if leads:
            send(message, peer, TAG)
            receive(message, peer, TAG)
        else:
            receive(message, peer, TAG)
            send(message, peer, TAG)
    return (time.perf_counter() - started) / batch / 2


def stream(
    comm: "MPI.Intracomm",
    peer: int,
    leads: bool,
    outgoing: Bytes,
    incoming: Bytes,
    both: bool,
    batch: int,
) -> float:
    """Time one message of a window in seconds, over `batch` windows; the receiver answers each.

    `both`: both ranks send a window at once; the time is then that of a message each way.
    """
    from mpi4py import MPI

    window = window_of(len(outgoing))
    out, into = [outgoing, MPI.BYTE], [incoming, MPI.BYTE]
    answer = [np.zeros(1, np.uint8), MPI.BYTE]
    isend, irecv, turns = comm.Isend, comm.Irecv, range(window)
    started = time.perf_counter()
    for _ in range(batch):
        requests = [irecv(into, peer, TAG) for _ in turns] if both or not leads else []
        if both or leads:
            requests += [isend(out, peer, TAG) for _ in turns]
        MPI.Request.Waitall(requests)
        if leads:
            comm.Recv(answer, peer, ANSWER)
        else:
            comm.Send(answer, peer, ANSWER)
    return (time.perf_counter() - started) / batch / window


def window_of(nbytes: int) -> int:
    return max(1, min(WINDOW, WINDOW_BYTES // max(nbytes, 1)))


Once = Callable[[int], float]


def _by_two(
    comm: "MPI.Intracomm",
    active: list[Pair],
    once: Callable[[Pair], Once],
    iterations: int,
    warmup: int,
    per_call: int,
) -> Seconds:
    """Measure seconds by iteration on the first rank of each pair, and take the slowest pair.

    The other ranks sleep, so that they take no core. `once(pair)` gives the function that times a
    batch; `per_call`: timed units in one turn of the batch.
    """
    own = [pair for pair in active if comm.rank in (pair.first, pair.second)]
    measured = np.zeros(iterations)
    if own:
        pair = own[0]
        call, peer = once(pair), pair.second if comm.rank == pair.first else pair.first
        trial = call(1)
        batch = batch_of(
            max(trial, float(comm.sendrecv(trial, peer, TAG, source=peer, recvtag=TAG))) * per_call
        )
        for turn in range(warmup + iterations):
            seconds = call(batch)
            if turn >= warmup and comm.rank == pair.first:
                measured[turn - warmup] = seconds
    # The idle ranks poll with pauses: a spinning rank could take a measured rank's core.
    patient_barrier(comm)
    from mpi4py import MPI

    most = np.empty_like(measured)
    comm.Allreduce(measured, most, MPI.MAX)
    return most


def run_pairs(bench: BenchContext, what: str) -> list[Section]:
    """Measure latency, bandwidth or bibw, pair by pair. Every rank calls it."""
    comm, options = bench.comm, bench.options
    chosen, sizes = pairs(bench.group.nodes), options.sizes_of(what)
    if not chosen:
        bench.note(f"{what} needs two ranks; start with mpirun -n 2")
        return []
    rows: list[Row] = []
    with bench.progress(what, len(chosen) * len(sizes)) as advance:
        for pair in chosen:
            for size in sizes:
                once = _once(comm, what, size)
                per_call = 2 if what == "latency" else window_of(size)
                seconds = _by_two(comm, [pair], once, options.iterations, options.warmup, per_call)
                ways = 2 if what == "bibw" else 1
                times = statistics.times(seconds)
                rows.append(
                    {
                        "level": pair.level,
                        "pair": pair.text,
                        "bytes": size,
                        **times.row(),
                        "bytes_per_second": ways * statistics.rate(size, times.median),
                        "window": 1 if what == "latency" else window_of(size),
                    }
                )
                advance()
    unit = {
        "latency": "half a round trip",
        "bandwidth": "one way",
        "bibw": "both ways at once, summed",
    }[what]
    return [Section(what, f"{what}: {unit}", rows, PAIR_COLUMNS)]


PAIR_COLUMNS: dict[str, Show] = {
    "level": text("level"),
    "ranks": text("pair"),
    "bytes": whole("bytes"),
    "window": whole("window"),
    **TIME_COLUMNS,
    "GB/s": scaled("bytes_per_second", 1e-9),
}


def _once(comm: "MPI.Intracomm", what: str, size: int) -> Callable[[Pair], Once]:
    def for_pair(pair: Pair) -> Once:
        leads = comm.rank == pair.first
        peer = pair.second if leads else pair.first
        outgoing, incoming = np.ones(size, np.uint8), np.ones(size, np.uint8)
        if what == "latency":
            return lambda batch: ping_pong(comm, peer, leads, outgoing, batch)
        return lambda batch: stream(comm, peer, leads, outgoing, incoming, what == "bibw", batch)

    return for_pair


def run_message_rate(bench: BenchContext) -> list[Section]:
    """Measure messages a second of all pairs at once, in windows one way. Every rank calls it."""
    comm, options, what = bench.comm, bench.options, "message-rate"
    active, rows = many_pairs(bench.group.nodes, comm.size), list[Row]()
    if not active:
        bench.note(f"{what} needs two ranks; start with mpirun -n 2")
        return []
    level = "node" if all(pair.level == "node" for pair in active) else "network"
    sizes = options.sizes_of(what)
    with bench.progress(what, len(sizes)) as advance:
        for size in sizes:
            once = _once(comm, what, size)
            seconds = _by_two(
                comm, active, once, options.iterations, options.warmup, window_of(size)
            )
            times = statistics.times(seconds)
            rows.append(
                {
                    "level": level,
                    "pairs": len(active),
                    "bytes": size,
                    "window": window_of(size),
                    **times.row(),
                    "messages_per_second": len(active) / times.median,
                    "bytes_per_second": len(active) * statistics.rate(size, times.median),
                }
            )
            advance()
    columns: dict[str, Show] = {
        "level": text("level"),
        "pairs": whole("pairs"),
        "bytes": whole("bytes"),
        "window": whole("window"),
        "messages/s": lambda row: f"{row['messages_per_second']:,.0f}",
        "GB/s": scaled("bytes_per_second", 1e-9),
    }
    named = ", ".join(pair.text for pair in active)
    return [Section(what, f"{what}: ranks {named}, at once", rows, columns)]


def fastest(what: str, rows: list[Row], level: str) -> float | None:
    """Give the best rate of `rows` at `level`, in messages or bytes a second, for the profile."""
    key = "messages_per_second" if what == "message-rate" else "bytes_per_second"
    return max((float(row[key]) for row in rows if row["level"] == level), default=None)
