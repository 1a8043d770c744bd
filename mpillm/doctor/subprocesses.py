"""Child processes with a time limit, for checks that may crash or hang.

A child is a file of this folder, started by its path: it must not depend on how the parent found
mpillm.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """The end of a child: its `code` (negative: a signal; None: out of time), and its output."""

    code: int | None
    out: str
    err: str = ""

    @property
    def how(self) -> str:
        """`was killed by SIGBUS`, `left with code 3: reason`, `did not end in time`.

        The reason is the first line of stderr, or the last of a traceback.
        """
        if self.code is None:
            return "did not end in time"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        lines = [line.strip() for line in self.err.splitlines() if any(map(str.isalnum, line))]
        traceback = lines[:1] and lines[0].startswith("Traceback")
        line = next(iter(lines[-1:] if traceback else lines), "")
        return f"left with code {self.code}" + (f": {line[:200]}" if line else "")


def run_child(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ended:
    """Run `command` to its end, or kill it after `seconds`. Raises OSError if it cannot start."""
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
        pass
    finally:
        # Out of time or interrupted: it has a session of its own, and would stay.
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    try:
        out, err = child.communicate(timeout=1)
    except subprocess.TimeoutExpired:
        # It hangs in the kernel, as on a file server that is gone: it cannot be killed.
        out, err = "", ""
    return Ended(None, out, err)


def trial(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], seconds: float
) -> Ended:
    """Run this folder's `name`.py as a child; it appends this process's sys.path to its own."""
    return run_child(
        [sys.executable, "-P", str(HERE / f"{name}.py"), json.dumps(sys.path), *arguments],
        environment,
        seconds,
    )
