"""Links of the ring of ranks: latency and bandwidth of neighbours, to find a slow pair.

All pairs of a round measure at once, in at most three rounds of a fixed time. So the check takes no
longer on many ranks than on few.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpillm.comm.waiting import wait_patiently
from mpillm.doctor.check_base import Check, World
from mpillm.doctor.findings import Finding
from mpillm.errors import LaunchError
from mpillm.system.console import counted

if TYPE_CHECKING:
    from mpi4py import MPI

AREA = "neighbours"
SMALL_BYTES, LARGE_BYTES = 8, 2 << 20
SMALL_SECONDS, LARGE_SECONDS, PATIENCE_SECONDS = 0.2, 0.4, 20.0
# Tests of a message before the waiting rank sleeps, about 10 ms: a sleep would spoil the latency.
SLEEPLESS = 20_000
CONTINUE, LAST = 1, 0
TAG = 73
# Pairs within a node are on one socket or on two, which alone makes a factor of about 2.
TIMES_SLOWER, LEAST_PAIRS = 4.0, 3
LEAST_SECONDS = 20e-6
PATH_NAMES = {"node": "within a host", "network": "between hosts"}


@dataclass(frozen=True)
class LinkPair:
    """Two neighbours, their hosts and their messages: `latency_seconds` is half a round trip."""

    first: int
    second: int
    hosts: tuple[str, str]
    latency_seconds: float
    bytes_per_second: float

    @property
    def level(self) -> str:
        return "node" if self.hosts[0] == self.hosts[1] else "network"

    @property
    def text(self) -> str:
        where = self.hosts[0] if self.level == "node" else " and ".join(self.hosts)
        return f"ranks {self.first} and {self.second} ({where})"


class NeighboursCheck(Check):
    name, area = "neighbours", AREA

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        if world.comm.size < 2:
            return []
        cpus: dict[str, frozenset[int]] = {}
        for place in world.places:
            cpus[place.host] = cpus.get(place.host, frozenset()) | place.cpus
        crowded = any(
            place.local_size > min(place.limit, len(cpus[place.host])) for place in world.places
        )
        led = measure(world.comm, world.host_of)
        # A pair between which no message passes has given up by then.
        world.meet(PATIENCE_SECONDS + 10)
        pairs = [pair for of_rank in world.comm.allgather(led) for pair in of_rank]
        return judge_neighbours(pairs, crowded)


def ring_rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """Sort the pairs of a ring into rounds with each rank in at most one pair of a round."""
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks if ranks > 2 else ranks - 1)]
    closing = ring[-1:] if ranks % 2 and ranks > 2 else []
    rest = ring[: len(ring) - len(closing)]
    return [some for some in (rest[::2], rest[1::2], closing) if some]


def measure(
    comm: "MPI.Intracomm", host_of: Sequence[str], patience: float = PATIENCE_SECONDS
) -> list[LinkPair]:
    """Measure this rank's pairs; return those that it led. Every rank calls it.

    Raises LaunchError where a message does not arrive within `patience` seconds.
    """
    led = []
    for pairs in ring_rounds(comm.size):
        for first, second in pairs:
            if comm.rank in (first, second):
                link = Link(comm, first + second - comm.rank, comm.rank == first, patience)
                latency = link.median(SMALL_BYTES, SMALL_SECONDS) / 2
                seconds = link.median(LARGE_BYTES, LARGE_SECONDS)
                if comm.rank == first:
                    hosts = (host_of[first], host_of[second])
                    bandwidth = LARGE_BYTES / max(seconds - latency, 1e-9)
                    led.append(LinkPair(first, second, hosts, latency, bandwidth))
    return led


class Link:
    """This rank's end of a pair: one end `leads` and measures, the other answers."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, leads: bool, patience: float) -> None:
        self.comm, self.peer, self.leads, self.patience = comm, peer, leads, patience
        self._answer = bytearray(SMALL_BYTES)

    def median(self, nbytes: int, seconds: float) -> float:
        """Return the median seconds from a send of `nbytes` to the answer; 0 on the answering end.

        Repeats for about `seconds`.
        """
        message = bytearray(nbytes)
        if not self.leads:
            going = True
            while going:
                self._receive(message)
                self._send(self._answer)
                going = message[0] == CONTINUE
            return 0.0
        times: list[float] = []
        until, most = time.perf_counter() + seconds, 20_000
        going = True
        while going:
            going = len(times) < 4 or (time.perf_counter() < until and len(times) < most)
            message[0] = CONTINUE if going else LAST
            started = time.perf_counter()
            self._send(message)
            self._receive(self._answer)
            times.append(time.perf_counter() - started)
        # The first two set up the connection and its memory.
        return statistics.median(times[2:])

    def _send(self, data: bytearray) -> None:
        from mpi4py import MPI

        self._wait(self.comm.Isend([data, MPI.BYTE], self.peer, TAG))

    def _receive(self, data: bytearray) -> None:
        from mpi4py import MPI

        self._wait(self.comm.Irecv([data, MPI.BYTE], self.peer, TAG))

    def _wait(self, request: "MPI.Request") -> None:
        if any(request.Test() for _ in range(SLEEPLESS)):
            return
        if not wait_patiently(request, self.patience):
            raise LaunchError(
                f"no message passed between ranks {self.comm.rank} and {self.peer} within "
                f"{self.patience:g} s; does a firewall block their hosts, or does MPI take an "
                "interface that leads nowhere (Open MPI: --mca btl_tcp_if_include NAME, "
                "MPICH: -iface NAME)?"
            )


def judge_neighbours(pairs: Sequence[LinkPair], crowded: bool) -> list[Finding]:
    """Judge the pairs of each kind; `crowded`: ranks share cores, so no pair's time is judged."""
    findings: list[Finding] = []
    for level, name in PATH_NAMES.items():
        of_level = [pair for pair in pairs if pair.level == level]
        if of_level:
            slow = (
                [] if crowded else [text for pair in of_level if (text := slower(pair, of_level))]
            )
            findings.append(_finding(name, of_level, slow, crowded))
    return findings


def _finding(name: str, pairs: Sequence[LinkPair], slow: Sequence[str], crowded: bool) -> Finding:
    median = f"{_microseconds(_latency(pairs))}, {_rate(_bandwidth(pairs))}"
    found = f"{counted(len(pairs), 'pair')}, {'median ' if len(pairs) > 1 else ''}{median}"
    if not slow:
        note = "; not judged, for ranks share cores" if crowded else ""
        return Finding(AREA, name, "ok", found + note)
    shown = "; ".join(slow[:4]) + (f"; and {len(slow) - 4} more" if len(slow) > 4 else "")
    remedy = (
        "is another job on that host (top), is its link slower than the others' (ibstat, ethtool)? "
        "exclude it (sbatch --exclude=NODE) until it is repaired"
    )
    return Finding(AREA, name, "warning", f"slow: {shown}; of {found}", remedy)


def slower(pair: LinkPair, pairs: Sequence[LinkPair]) -> str:
    """Describe how `pair` is far slower than the median of its kind; "" where it is not.

    Returns "" too where there are few pairs, whose median means little.
    """
    if len(pairs) < LEAST_PAIRS:
        return ""
    parts = []
    if pair.latency_seconds > max(TIMES_SLOWER * _latency(pairs), _latency(pairs) + LEAST_SECONDS):
        parts.append(_microseconds(pair.latency_seconds))
    if pair.bytes_per_second * TIMES_SLOWER < _bandwidth(pairs):
        parts.append(_rate(pair.bytes_per_second))
    return f"{pair.text} {' and '.join(parts)}" if parts else ""


def _latency(pairs: Sequence[LinkPair]) -> float:
    return statistics.median(pair.latency_seconds for pair in pairs)


def _bandwidth(pairs: Sequence[LinkPair]) -> float:
    return statistics.median(pair.bytes_per_second for pair in pairs)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.2f} GB/s"
