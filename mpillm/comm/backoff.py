"""Back off between polls where ranks and other processes share cores.

The constants are those of csrc/flags.h, which the kernel's own waits use, too: one table for C and
Python.
"""

import os
import time
from typing import TYPE_CHECKING

from mpillm.comm.kernel import WAITING

if TYPE_CHECKING:
    from mpi4py import MPI


def share_cores(comm: "MPI.Intracomm") -> bool:
    """Return whether the ranks of `comm`, all of one node, outnumber their cores. Every rank calls
    it.
    """
    return comm.size > len(set().union(*comm.allgather(os.sched_getaffinity(0))))


class Backoff:
    """Call it between two polls: it yields the core, and sleeps where the core is oversubscribed.

    A yield that takes long means that another process had the core. A rank that polls and yields
    would still take a good part of that core, so the next polls sleep instead.
    """

    def __init__(self) -> None:
        self._sleeps = 0

    def __call__(self) -> None:
        if self._sleeps:
            self._sleeps -= 1
            time.sleep(WAITING["CROWDED_SLEEP_SECONDS"])
            return
        began = time.monotonic()
        os.sched_yield()
        if time.monotonic() - began > WAITING["TAKEN_SECONDS"]:
            self._sleeps = int(WAITING["CROWDED_SLEEPS"])
