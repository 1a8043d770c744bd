"""Waiting that lets the core go: for the ranks that stand by while one rank works for long."""

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

FIRST_SLEEP_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 10e-3

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


def patient_barrier(comm: "MPI.Intracomm") -> None:
    """Return when every rank of `comm` has come here; those that came early sleep. Every rank calls it."""
    wait_patiently(comm.Ibarrier())


def patient_bcast(comm: "MPI.Intracomm", value: Value, root: int = 0) -> Value:
    """`root`'s small picklable `value` on every rank; the others sleep while `root` works for it.

    Every rank of `comm` calls it, in the same order; what the others pass as `value` is ignored.
    """
    patient_barrier(comm)
    return comm.bcast(value, root)  # type: ignore[no-any-return]
