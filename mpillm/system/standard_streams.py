"""Standard output and standard error, whatever is at their other end.

A closed pipe, a full disk, a closed descriptor or a terminal that cannot print a letter never ends
work that is running: what cannot be written is dropped, and `lost` has the reason.
"""

import errno
import os
import sys
from typing import IO, Any

from mpillm.errors import UsageError
from mpillm.system.messages import explain

STDOUT, STDERR = 1, 2


class GuardedStream:
    """A text stream that never raises for what its other end does; `lost` is the first reason."""

    def __init__(self, stream: IO[str], descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as failure:
            self._lose(failure)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as failure:
            self._lose(failure)

    def _lose(self, failure: OSError) -> None:
        self.lost = self.lost or failure
        # What is still buffered goes nowhere, else each later flush would fail again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)


def guard_streams(mute: bool = False) -> None:
    """Guard stdout and stderr of this process. Called once, before anything is printed.

    `mute`: what is printed to stdout from now on is dropped.
    """
    open_missing_descriptors()
    for name, descriptor in (("stdout", STDOUT), ("stderr", STDERR)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        if hasattr(stream, "reconfigure"):
            # A letter that the terminal's encoding lacks is printed as \\xNN.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream, descriptor))
    if mute:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def open_missing_descriptors() -> None:
    """Open /dev/null in place of closed standard descriptors.

    Otherwise the next file that is opened becomes standard output, and MPI prints into it.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > STDERR:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def refuse_lost_output() -> None:
    """Raise UsageError where standard output was lost; a reader that has left is no failure."""
    sys.stdout.flush()
    lost: OSError | None = getattr(sys.stdout, "lost", None)
    if lost is not None and lost.errno != errno.EPIPE:
        raise UsageError(f"cannot write the output: {explain(lost)}")
