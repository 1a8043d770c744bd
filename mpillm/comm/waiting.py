"""Wait for ranks that work for long: sleep instead of spinning, which would take their cores."""

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

# Not from the kernel's table: a rank must be able to wait, and to fail, without the compiled
# module. The first sleep is short against a barrier over a network, the longest against work worth
# a sleep.
FIRST_SLEEP_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 10e-3

Value = TypeVar("Value")


def wait_patiently(request: "MPI.Request", limit_seconds: float | None = None) -> bool:
    """Test `request` between sleeps that double; True when it completed, False after the limit.

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
    """Wait, asleep, until every rank of `comm` has called it."""
    wait_patiently(comm.Ibarrier())


def patient_bcast(comm: "MPI.Intracomm", value: Value, root: int = 0) -> Value:
    """Broadcast the small picklable `value` of `root`; the others sleep while `root` still works on
    it.

    Every rank of `comm` calls it, in the same order; the `value` of the others is ignored.
    """
    patient_barrier(comm)
    return comm.bcast(value, root)  # type: ignore[no-any-return]
