"""Compute order statistics of times, bandwidths as nccl-tests defines them, and ratios."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Times:
    """Hold seconds of a call over the iterations, each as long as its slowest rank took."""

    least: float
    median: float
    p99: float
    most: float

    def row(self) -> dict[str, float]:
        return {
            "min_seconds": self.least,
            "median_seconds": self.median,
            "p99_seconds": self.p99,
            "max_seconds": self.most,
        }


def times(seconds: Seconds) -> Times:
    return Times(*(float(value) for value in np.percentile(seconds, [0, 50, 99, 100])))


def bus_factor(operation: str, ranks: int) -> float:
    """Give busbw / algbw: bytes through each rank's link for a byte of the array.

    From nccl-tests, PERFORMANCE.md. 0 for the barrier, which has no bytes.
    """
    others = (ranks - 1) / ranks
    factors = {"allreduce": 2 * others, "broadcast": 1.0, "reduce": 1.0, "barrier": 0.0}
    return factors.get(operation, others)


def floor_share(operation: str, ranks: int) -> float:
    """Give the fewest bytes that an average rank reads and writes, as a share of a copy's.

    An all-reduce reads and writes the array once, as a copy does. A rank of an all-gather reads its
    block and writes the array; a reduce-scatter the reverse. A broadcast's root reads, the others
    write.
    """
    block = 1 / ranks
    shares = {
        "reduce_scatter": (1 + block) / 2,
        "allgather": (1 + block) / 2,
        "reduce": (1 + block) / 2,
    }
    return {**shares, "broadcast": 0.5, "barrier": 0.0}.get(operation, 1.0)


def ratios(library: Seconds, own: Seconds) -> dict[str, float]:
    """Divide the MPI library's times by `own`, round by round, and give the quartiles.

    Both were measured in the same round, so a noisy round leaves its ratio alone.
    """
    low, middle, high = np.percentile(library / own, [25, 50, 75])
    return {
        "mpi_ratio": float(middle),
        "mpi_ratio_q1": float(low),
        "mpi_ratio_q3": float(high),
    }


def overlap(alone: float, compute: float, together: float) -> float:
    """Give the share of an operation that overlapped computation, 0 to 1 (osu_iallreduce)."""
    return min(1.0, max(0.0, 1 - (together - compute) / alone))


def rate(nbytes: float, seconds: float) -> float:
    return nbytes / seconds if seconds > 0 else 0.0


def collective_row(operation: str, nbytes: int, ranks: int, seconds: Seconds) -> dict[str, Any]:
    """Make the figures of one algorithm at one size; docs/bench.md explains the keys."""
    found = times(seconds)
    speed = rate(nbytes, found.median)
    return {
        **found.row(),
        "algorithm_bytes_per_second": speed,
        "bus_bytes_per_second": speed * bus_factor(operation, ranks),
    }
