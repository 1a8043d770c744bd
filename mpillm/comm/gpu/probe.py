"""Which operations this MPI does with memory of a GPU: each is tried, in a child process, for it may crash or hang.

The child is a process of its own, that messages itself, in no job: inside one, not every launcher lets another start.
It cannot try what happens between two GPUs, so `mpillm bench … --device cuda --check` has the last word. A `launch`
("mpirun", "-n", "2") makes it a job, where that can be had.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from mpillm.comm.gpu.gpu_aware import ARITHMETIC, MESSAGES
from mpillm.system.environment import without_launcher

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall")
TRIALS = (MESSAGES, *OPERATIONS, ARITHMETIC)
READY = "ready"
CHILD = (sys.executable, "-m", "mpillm.comm.gpu.probe_child", "cuda")
# One child, with the import of CuPy; and all of them.
CHILD_SECONDS, ALL_SECONDS = 60.0, 240.0


def probe(
    environment: Mapping[str, str],
    *,
    launch: Sequence[str] = (),
    child: Sequence[str] = CHILD,
    child_seconds: float = CHILD_SECONDS,
    all_seconds: float = ALL_SECONDS,
) -> dict[str, bool]:
    """Trial → whether it ended well. One rank calls it; whatever cannot be tried did not.

    A trial that takes its child down, or keeps it for `child_seconds`, has failed; another child goes on behind it.
    """
    found = dict.fromkeys(TRIALS, False)
    left, until = list(TRIALS), time.monotonic() + all_seconds
    while left and time.monotonic() < until:
        seconds = min(child_seconds, until - time.monotonic())
        lines = _ask([*launch, *child, *left], without_launcher(environment), seconds)
        if not lines or lines[0] != READY:
            break
        told = dict(line.split() for line in lines[1:] if line.count(" ") == 1)
        found |= {name: told[name] == "ok" for name in left if name in told}
        # The first of which nothing was told is the one that went wrong.
        left = left[len(told) + 1 :]
    return found


def _ask(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> list[str]:
    """What a child wrote, line by line, until it ended, crashed, or `seconds` were over."""
    try:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    except OSError:
        return []
    try:
        written, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # A session of its own: a launcher's processes go with it.
        os.killpg(child.pid, signal.SIGKILL)
        written, _ = child.communicate()
    return [
        line for line in written.splitlines() if line == READY or line.endswith((" ok", " wrong"))
    ]


def tell(name: str, out: IO[str], well: bool | None = None) -> None:
    """The child's side: a line that `probe` reads, written through at once."""
    out.write(name + ("" if well is None else f" {'ok' if well else 'wrong'}") + "\n")
    out.flush()
