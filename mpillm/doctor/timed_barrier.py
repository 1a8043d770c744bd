"""Meeting points with a time limit: a rank that hangs or died must not keep the others for ever."""

import time
from typing import TYPE_CHECKING

from mpillm.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

# Longer than the longest check of one rank, the imports of its packages.
MEETING_SECONDS = 300.0
FIRST_SLEEP_SECONDS, LONGEST_SLEEP_SECONDS = 50e-6, 10e-3


def meet(comm: "MPI.Intracomm", seconds: float = MEETING_SECONDS) -> None:
    """Return when every rank of `comm` has come here; those that came early sleep. Every rank calls it.

    Raises LaunchError where some did not come within `seconds`.
    """
    if not done_within(comm.Ibarrier(), seconds):
        raise LaunchError(
            f"some ranks did not come within {seconds:.0f} s, or their messages do not arrive; look at the job's nodes "
            "and at the firewall between them, then start again with fewer hosts to find the one that fails"
        )


def done_within(request: "MPI.Request", seconds: float, sleepless: int = 0) -> bool:
    """Whether `request` completed in time; the first `sleepless` tests follow each other without a pause."""
    until, turn, pause = time.monotonic() + seconds, 0, FIRST_SLEEP_SECONDS
    while not request.Test():
        turn += 1
        if turn <= sleepless:
            continue
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_SLEEP_SECONDS)
    return True
