"""Waiting that lets the core go: where one rank works for long, and where others compute on this rank's core."""

import os
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

FIRST_SLEEP_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 10e-3
NAP_SECONDS = 100e-6
# Who offers a core and has it back at once was alone on it.
TAKEN_SECONDS = 100e-6
# Until the core is offered again: some 0.2 s.
NAPS = 1000
# A segment of a list takes half of it over 10 Gbit/s, so that such networks are looked at without a pause.
QUIET_SECONDS = 100e-6

Value = TypeVar("Value")


def wait_patiently(request: "MPI.Request", limit_seconds: float | None = None) -> bool:
    """Test `request`, sleeping longer and longer between; True when it completed, False after the limit.

    MPI's own Wait spins: it would burn the core that the working rank's threads could use.
    """
    started, sleep_seconds = time.monotonic(), FIRST_SLEEP_SECONDS
    while not request.Test():
        if limit_seconds is not None and time.monotonic() - started > limit_seconds:
            return False
        time.sleep(sleep_seconds)
        sleep_seconds = min(2 * sleep_seconds, LONGEST_SLEEP_SECONDS)
    return True


def share_cores(comm: "MPI.Intracomm") -> bool:
    """Whether the ranks of `comm`, all of one node, are more than their cores. Every rank calls it, with one answer."""
    return comm.size > len(set().union(*comm.allgather(os.sched_getaffinity(0))))


class Backoff:
    """To be taken between two looks: it offers the core to others. Where they take it, the next ones are naps: who
    looks without a pause, and offers the core each time, still has a good part of it. So is each one while nothing
    moves over a slow network, which needs no more looks.
    """

    def __init__(self) -> None:
        self._naps = 0
        self._moved = True
        self._moved_at = 0.0

    def moved(self) -> None:
        """Something was found to have moved, has begun or has ended."""
        self._moved = True

    def __call__(self, told: bool = False) -> None:
        """`told`: `moved` is called for each part of all that is waited for."""
        began = time.monotonic()
        if self._moved:
            self._moved, self._moved_at = False, began
        if self._naps or (told and began - self._moved_at > QUIET_SECONDS):
            self._naps = max(0, self._naps - 1)
            time.sleep(NAP_SECONDS)
            return
        os.sched_yield()
        if time.monotonic() - began > TAKEN_SECONDS:
            self._naps = NAPS


def patient_barrier(comm: "MPI.Intracomm") -> None:
    """Return when every rank of `comm` has come here; those that came early sleep. Every rank calls it."""
    wait_patiently(comm.Ibarrier())


def patient_bcast(comm: "MPI.Intracomm", value: Value, root: int = 0) -> Value:
    """`root`'s small picklable `value` on every rank; the others sleep while `root` works for it.

    Every rank of `comm` calls it, in the same order; what the others pass as `value` is ignored.
    """
    patient_barrier(comm)
    return comm.bcast(value, root)  # type: ignore[no-any-return]
