"""Checks that may crash or hang run in a child process with a time limit, so that they take no one with them.

A child is a file of this folder, started by its path: it must not matter how the parent came to find mpillm.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a child ended: its `code` (negative: a signal; None: it was stopped after its time), and what it wrote."""

    code: int | None
    out: str
    err: str = ""

    @property
    def how(self) -> str:
        """`was killed by SIGBUS`, `left with code 3: why`, `did not end in time`. Why: the first line of stderr, of a
        traceback the last.
        """
        if self.code is None:
            return "did not end in time"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        told = [line.strip() for line in self.err.splitlines() if any(map(str.isalnum, line))]
        line = next(iter(told[-1:] if told[:1] and told[0].startswith("Traceback") else told), "")
        return f"left with code {self.code}" + (f": {line[:200]}" if line else "")


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ended:
    """Run `command` to its end, or for `seconds`. Raises OSError where it cannot be started."""
    child = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=seconds)
        return Ended(child.returncode, out, err)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
    try:
        out, err = child.communicate(timeout=1)
    except (
        subprocess.TimeoutExpired
    ):  # it hangs in the kernel, as on a file server that is gone: leave it there
        out, err = "", ""
    return Ended(None, out, err)


def trial(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], seconds: float
) -> Ended:
    """Run this folder's `name`.py as a child, with this process's ways to find modules behind its own."""
    return run(
        [sys.executable, "-P", str(HERE / f"{name}.py"), json.dumps(sys.path), *arguments],
        environment,
        seconds,
    )
