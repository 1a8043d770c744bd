"""How soon a message is handed over, alone and while its sender computes: by Mail's two ways, and by bare MPI."""

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

# How long the sender computes. A stage of a pipeline computes for so long and longer, and it is more than any of the
# default sizes needs for its way.
WORK_SECONDS = 10e-3
BARE_MPI = "mpi"
TAG = 73
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Hand(Protocol):
    """One way between this rank and the other of its pair, for messages of one length in both directions."""

    def send(self, array: Bytes) -> None: ...
    def expect(self, array: Bytes) -> None: ...
    def wait(self) -> None: ...
    def finish(self) -> None:
        """Return when what was sent is on its way."""

    def free(self) -> None: ...


class ByMail:
    """Both ranks of `pair` make it. Raises CommError, on both, where the way can't be had."""

    def __init__(self, pair: "MPI.Intracomm", nbytes: int, way: str) -> None:
        self._mail = ChannelSet(pair, [Channel(0, 1, nbytes), Channel(1, 0, nbytes)], way=way)
        self._out, self._back = pair.rank, 1 - pair.rank
        self.finish, self.free = self._mail.drain, self._mail.free

    def send(self, array: Bytes) -> None:
        self._mail.send(self._out, array)

    def expect(self, array: Bytes) -> None:
        self._mail.expect(self._back, array)

    def wait(self) -> None:
        self._mail.wait(self._back)


class ByRequests:
    """Isend, Irecv and Wait, and nothing that moves them between."""

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
        """Nothing is kept."""


def round_trip(hand: Hand, leads: bool, outgoing: Bytes, incoming: Bytes) -> None:
    """A message there and one back."""
    hand.expect(incoming)
    if leads:
        hand.send(outgoing)
        hand.wait()
    else:
        hand.wait()
        hand.send(outgoing)
    hand.finish()


def behind_work(
    pair: "MPI.Intracomm",
    hands: Mapping[str, Hand],
    outgoing: Bytes,
    incoming: Bytes,
    iterations: int,
    warmup: int,
) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Seconds from rank 0's send until rank 1 has the message; and seconds that rank 0 spends in its calls for it.

    Each (iterations,), on both ranks. Rank 0 computes for WORK_SECONDS right after it has sent, and calls nothing of
    MPI meanwhile. Both ranks of `pair` call it.
    """
    from mpi4py import MPI

    names, unit, offset = list(hands), computation(WORK_SECONDS)[0], clock_offset(pair)
    # [0]: when it arrived, less when it was sent, each known on one rank; their sum is what it took. [1]: the sender's.
    clock = np.zeros((2, len(names), warmup + iterations))
    for turn in range(warmup + iterations):
        for name in in_turn(names, turn):
            hand, place = hands[name], (names.index(name), turn)
            if pair.rank:
                hand.expect(incoming)
                pair.Barrier()
                hand.wait()
                clock[0][place] = time.perf_counter() - offset
            else:
                pair.Barrier()
                begun, spent = _send_and_work(hand, outgoing, unit)
                clock[0][place], clock[1][place] = offset - begun, spent
    taken = np.empty_like(clock)
    pair.Allreduce(clock, taken, MPI.SUM)
    arrival, sending = (dict(zip(names, part[:, warmup:], strict=True)) for part in taken)
    return arrival, sending


def _send_and_work(hand: Hand, outgoing: Bytes, unit: Call) -> tuple[float, float]:
    """When the message was sent, and the seconds that were not for work."""
    begun = time.perf_counter()
    hand.send(outgoing)
    sent = time.perf_counter()
    while time.perf_counter() < begun + WORK_SECONDS:
        unit()
    worked = time.perf_counter()
    hand.finish()
    return begun, time.perf_counter() - worked + sent - begun


def run_handover(bench: BenchContext) -> list[Section]:
    """Pair by pair and size by size. Every rank calls it."""
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
    title = f"handover: half a round trip; a message whose sender computes for {WORK_SECONDS * 1e3:.0f} ms behind it"
    return [Section("handover", title, rows, COLUMNS)]


def _measure(
    bench: BenchContext, pair: Pair, joined: "MPI.Intracomm", size: int
) -> tuple[list[Row], str]:
    """The rows of one size, a way each, and what could not be had. Both ranks of the pair call it."""
    rounds = bench.options.iterations, bench.options.warmup
    outgoing, incoming = np.ones(size, np.uint8), np.ones(size, np.uint8)
    hands, note = _open(pair, joined, size)
    calls = {
        name: lambda hand=hand: lambda: round_trip(hand, joined.rank == 0, outgoing, incoming)
        for name, hand in hands.items()
    }
    both = interleave(joined, calls, *rounds)
    behind, sending = behind_work(joined, hands, outgoing, incoming, *rounds)
    for hand in hands.values():
        hand.free()
    # As soon as any way could have brought it.
    soonest = min(float(np.median(seconds)) for seconds in both.values()) / 2
    rows: list[Row] = [
        {
            "level": pair.level,
            "pair": pair.text,
            "bytes": size,
            "way": name,
            **_quartiles("half_round_trip_seconds", both[name] / 2),
            **_quartiles("behind_work_seconds", behind[name]),
            "later_seconds": float(np.median(behind[name])) - soonest,
            **_quartiles("sender_seconds", sending[name]),
            "work_seconds": WORK_SECONDS,
        }
        for name in hands
    ]
    return rows, note


def _open(pair: Pair, joined: "MPI.Intracomm", size: int) -> tuple[dict[str, Hand], str]:
    hands: dict[str, Hand] = {}
    note = ""
    if pair.level == "node":
        try:
            hands["shared"] = ByMail(joined, size, "shared")
        except CommError as failure:
            note = f"handover has no shared: {failure}"
    return hands | {
        "messages": ByMail(joined, size, "messages"),
        BARE_MPI: ByRequests(joined),
    }, note


def _quartiles(key: str, seconds: Seconds) -> dict[str, float]:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {key: float(middle), f"{key}_q1": float(low), f"{key}_q3": float(high)}


def _spread(key: str) -> Show:
    """In µs."""
    return lambda row: (
        f"{figure(row[key] * 1e6)} [{figure(row[key + '_q1'] * 1e6)}..{figure(row[key + '_q3'] * 1e6)}]"
    )


COLUMNS: dict[str, Show] = {
    "level": text("level"),
    "ranks": text("pair"),
    "bytes": whole("bytes"),
    "way": text("way"),
    "half a round trip µs": _spread("half_round_trip_seconds"),
    "behind work µs": _spread("behind_work_seconds"),
    "later than could be µs": scaled("later_seconds", 1e6),
    "sender µs": scaled("sender_seconds", 1e6),
}
