"""Probe which operations this MPI supports on GPU memory, in a child: they may crash or hang.

The child is a singleton that sends messages to itself: not every launcher starts a job inside a
job. It cannot try messages between two GPUs, which `mpillm bench … --device cuda --check` does.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from mpillm.comm.gpu.gpu_aware import ARITHMETIC, MESSAGES
from mpillm.system.environment import without_launcher
from mpillm.system.lone_mpi import lone_environment

OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall")
TRIALS = (MESSAGES, *OPERATIONS, ARITHMETIC)
READY = "ready"
CHILD = (sys.executable, "-m", "mpillm.comm.gpu.probe_child", "cuda")
# Limits for one child, which imports CuPy first, and for all of them.
CHILD_SECONDS, ALL_SECONDS = 60.0, 240.0


def probe(
    environment: Mapping[str, str],
    *,
    child: Sequence[str] = CHILD,
    child_seconds: float = CHILD_SECONDS,
    all_seconds: float = ALL_SECONDS,
) -> dict[str, bool]:
    """Run all trials; return trial → True where it succeeded. One rank calls it.

    A trial that crashes its child, or takes longer than `child_seconds`, has failed; another child
    continues with the next trial. Trials that could not run count as failed.
    """
    found = dict.fromkeys(TRIALS, False)
    left, until = list(TRIALS), time.monotonic() + all_seconds
    with lone_environment(without_launcher(environment)) as own:
        while left and time.monotonic() < until:
            seconds = min(child_seconds, until - time.monotonic())
            lines = _run_child([*child, *left], own, seconds)
            if not lines or lines[0] != READY:
                break
            answers = dict(line.split() for line in lines[1:] if line.count(" ") == 1)
            found |= {name: answers[name] == "ok" for name in left if name in answers}
            # The first trial without an answer is the one that crashed or hung: skip it.
            left = left[len(answers) + 1 :]
    return found


def _run_child(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> list[str]:
    """Run a child; return its answers, until it ended, crashed, or `seconds` were over."""
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
        _kill(child)
        written, _ = child.communicate()
    except BaseException:
        _kill(child)
        raise
    return [
        line for line in written.splitlines() if line == READY or line.endswith((" ok", " wrong"))
    ]


def _kill(child: "subprocess.Popen[str]") -> None:
    """Kill the child's session, so that a launcher's processes end with it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def report_trial(name: str, out: IO[str], well: bool | None = None) -> None:
    """Write one answer for `probe` to read; flushed, because the next trial may crash."""
    out.write(name + ("" if well is None else f" {'ok' if well else 'wrong'}") + "\n")
    out.flush()
