"""The clock: competitors take turns round by round, in changing order, so that a noisy machine is noisy for all."""

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
"""Makes ready outside the clock what the call then does inside it."""
# So long at the least does the clock run, that its own cost and a barrier's parting are small beside it.
LEAST_SECONDS = 200e-6
LARGEST_BATCH = 1000


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order of round `turn`: by chance, but the same on all ranks and in each run; odd rounds go backwards.

    In a rotation each would follow the same neighbour nearly always, and find the caches as that one leaves them.
    """
    order = random.Random(turn // 2).sample(names, len(names))
    return order[::-1] if turn % 2 else order


def batch_of(seconds: float) -> int:
    """Calls to time in one go."""
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
    """Seconds a call of each competitor in each iteration (iterations,), of the slowest rank; the same on every rank.

    Every rank of `comm` calls it with the same names. A barrier goes before each timed batch and is not counted.
    `fresh`: make anew for each iteration, and time a single call; `advance` is called after each round.
    """
    names = list(competitors)
    kept = {} if fresh else {name: make() for name, make in competitors.items()}
    batches = dict.fromkeys(names, 1)
    if not fresh:
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
    """Each figure's maximum over the ranks. Every rank calls it."""
    from mpi4py import MPI

    most = np.empty_like(seconds)
    comm.Allreduce(np.ascontiguousarray(seconds), most, MPI.MAX)
    return most
