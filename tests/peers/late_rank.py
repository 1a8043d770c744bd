"""Ranks of which the first is late, so that the others must wait for it: `late_rank.py NEW_FILE`, under a launcher.

Ends with an error where one did not wait.
"""

import sys
import time
from pathlib import Path

from mpi4py import MPI

from mpillm.system.pmix import wait_until_all_began

sign = Path(sys.argv[1])
if MPI.COMM_WORLD.rank == 0:
    time.sleep(1)
    sign.touch()
wait_until_all_began(MPI.COMM_WORLD.size)
assert MPI.COMM_WORLD.size > 1
assert sign.exists(), f"rank {MPI.COMM_WORLD.rank} did not wait"
