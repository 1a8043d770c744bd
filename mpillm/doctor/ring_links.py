"""Messages between neighbours in the ring of ranks, all pairs of a round at once: which pair is slower than its like?

Three rounds at the most, each of a fixed time, so it takes no longer on many ranks than on few.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpillm.doctor.findings import Finding
from mpillm.doctor.timed_barrier import done_within
from mpillm.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

AREA = "neighbours"
SMALL_BYTES, LARGE_BYTES = 8, 2 << 20
SMALL_SECONDS, LARGE_SECONDS, PATIENCE_SECONDS = 0.2, 0.4, 20.0
# How many tests of a message follow each other before the waiting rank sleeps: about 10 ms.
SLEEPLESS = 20_000
GOES_ON, LAST = 1, 0
TAG = 73
# Pairs within a node lie on one socket or on two, which alone makes a factor of 2 or so.
TIMES_SLOWER, LEAST_PAIRS = 4.0, 3
LEAST_SECONDS = 20e-6
PATH_NAMES = {"node": "within a host", "network": "between hosts"}


@dataclass(frozen=True)
class LinkPair:
    """Two neighbours, their hosts, and what their messages took: `latency_seconds` is half a round trip."""

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


def rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """The pairs of a ring so that each rank is in one pair of a round at the most."""
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks if ranks > 2 else ranks - 1)]
    closing = ring[-1:] if ranks % 2 and ranks > 2 else []
    rest = ring[: len(ring) - len(closing)]
    return [some for some in (rest[::2], rest[1::2], closing) if some]


def measure(
    comm: "MPI.Intracomm", host_of: Sequence[str], patience: float = PATIENCE_SECONDS
) -> list[LinkPair]:
    """The pairs that this rank led. Every rank calls it. Raises LaunchError where a message does not arrive."""
    led = []
    for pairs in rounds(comm.size):
        for first, second in pairs:
            if comm.rank in (first, second):
                link = Link(comm, first + second - comm.rank, comm.rank == first, patience)
                latency = link.median(SMALL_BYTES, SMALL_SECONDS) / 2
                seconds = link.median(LARGE_BYTES, LARGE_SECONDS)
                if comm.rank == first:
                    hosts = (host_of[first], host_of[second])
                    led.append(
                        LinkPair(
                            first,
                            second,
                            hosts,
                            latency,
                            LARGE_BYTES / max(seconds - latency, 1e-9),
                        )
                    )
    return led


class Link:
    """This rank's end of a pair; one end `leads`, the other answers."""

    def __init__(self, comm: "MPI.Intracomm", peer: int, leads: bool, patience: float) -> None:
        self.comm, self.peer, self.leads, self.patience = comm, peer, leads, patience
        self._answer = bytearray(SMALL_BYTES)

    def median(self, nbytes: int, seconds: float) -> float:
        """Seconds from the sending of `nbytes` to the answer's coming, for about `seconds`; 0 where it only answers."""
        message = bytearray(nbytes)
        if not self.leads:
            going = True
            while going:
                self._receive(message)
                self._send(self._answer)
                going = message[0] == GOES_ON
            return 0.0
        times: list[float] = []
        # The first two find the way and the memory for it.
        until, most = time.perf_counter() + seconds, 20_000
        going = True
        while going:
            going = len(times) < 4 or (time.perf_counter() < until and len(times) < most)
            message[0] = GOES_ON if going else LAST
            started = time.perf_counter()
            self._send(message)
            self._receive(self._answer)
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def _send(self, data: bytearray) -> None:
        from mpi4py import MPI

        self._wait(self.comm.Isend([data, MPI.BYTE], self.peer, TAG))

    def _receive(self, data: bytearray) -> None:
        from mpi4py import MPI

        self._wait(self.comm.Irecv([data, MPI.BYTE], self.peer, TAG))

    def _wait(self, request: "MPI.Request") -> None:
        if not done_within(request, self.patience, SLEEPLESS):
            raise LaunchError(
                f"no message passed between ranks {self.comm.rank} and {self.peer} within {self.patience:g} s; does a "
                "firewall stand between their hosts, or does MPI take an interface that leads nowhere (Open MPI: "
                "--mca btl_tcp_if_include NAME, MPICH: -iface NAME)?"
            )


def judge_neighbours(pairs: Sequence[LinkPair], crowded: bool) -> list[Finding]:
    """`crowded`: ranks share cores, so that each pair's time is a matter of luck and none is judged."""
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
    found = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}, {'median ' if len(pairs) > 1 else ''}{median}"
    if not slow:
        return Finding(
            AREA, name, "ok", found + ("; not judged, for ranks share cores" if crowded else "")
        )
    shown = "; ".join(slow[:4]) + (f"; and {len(slow) - 4} more" if len(slow) > 4 else "")
    remedy = (
        "is another job on that host (top), is its link slower than the others' (ibstat, ethtool)? leave it out "
        "(sbatch --exclude=NODE) until it is mended"
    )
    return Finding(AREA, name, "warning", f"slow: {shown}; of {found}", remedy)


def slower(pair: LinkPair, pairs: Sequence[LinkPair]) -> str:
    """In what `pair` stays far behind the median of its kind; "" where it does not, or where there are few."""
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
