"""Time competitors in turns, round by round in changing order: noise hits all of them alike."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpillm.bench.statistics import Seconds

if TYPE_CHECKING:
    from mpi4py import MPI

Call = Callable[[], object]
Make = Callable[[], Call]
"""Prepares, untimed, the call that is timed."""
# Minimum timed interval: keeps timer cost and barrier exit skew negligible.
LEAST_SECONDS = 200e-6
# Bounds a round where a call takes less than the timer resolves.
LARGEST_BATCH = 1000


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """Draw the order of round `turn`, the same on all ranks and in each run; odd rounds reverse it.

    In a rotation a competitor would nearly always follow the same one, and find its cache contents.
    """
    order = random.Random(turn // 2).sample(names, len(names))
    return order[::-1] if turn % 2 else order


def batch_of(seconds: float) -> int:
    """Count the calls to time in one interval."""
    return min(LARGEST_BATCH, max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))


def interleave(
    comm: "MPI.Intracomm",
    competitors: Mapping[str, Make],
    iterations: int,
    warmup: int,
    *,
    fresh: bool = False,
    advance: Call = lambda: None,
) -> dict[str, Seconds]:
    """Time each competitor: seconds a call by iteration (iterations,), of the slowest rank.

    Every rank of `comm` calls it with the same names and gets the same times. A barrier precedes
    each timed batch and is not counted. `fresh`: prepare each iteration's call again and time it
    alone; `advance` is called after each round.
    """
    names = list(competitors)
    kept = {} if fresh else {name: make() for name, make in competitors.items()}
    batches = dict.fromkeys(names, 1)
    if not fresh:
        # The faster of two trials: the first pays for page faults and lazy initialization.
        alone = np.array([_timed(comm, kept[name], 1) for name in names for _ in range(2)]).reshape(
            -1, 2
        )
        for name, seconds in zip(names, slowest(comm, alone.min(1)), strict=True):
            batches[name] = batch_of(float(seconds))
    measured = np.zeros((len(names), warmup + iterations))
    for turn in range(warmup + iterations):
        for name in in_turn(names, turn):
            call = competitors[name]() if fresh else kept[name]
            measured[names.index(name), turn] = _timed(comm, call, batches[name])
            del call
        advance()
    return dict(zip(names, slowest(comm, measured)[:, warmup:], strict=True))


def _timed(comm: "MPI.Intracomm", call: Call, batch: int) -> float:
    comm.Barrier()
    # Without the loop: its overhead would show in a single short call.
    if batch == 1:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    turns = range(batch)
    started = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - started) / batch


def slowest(comm: "MPI.Intracomm", seconds: Seconds) -> Seconds:
    """Take each figure's maximum over the ranks. Every rank calls it."""
    from mpi4py import MPI

    # A collective has ended when its last rank has.
    most = np.empty_like(seconds)
    comm.Allreduce(np.ascontiguousarray(seconds), most, MPI.MAX)
    return most
