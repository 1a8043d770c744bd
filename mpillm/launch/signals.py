"""Signals that ask a job to stop: from a user, a launcher or a batch system."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and PBS send SIGTERM and the signal of our scripts, SIGUSR1. LSF sends SIGUSR2 at its limit,
# and our scripts SIGURG before it. A terminal sends SIGINT.
NOTED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG)
# A closed terminal sends SIGHUP, a limit of processor time SIGXCPU.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)


class StopSignals:
    """Record the signals that ask to stop.

    One a process, made in its main thread before slow imports. SIGUSR1, SIGUSR2 and SIGURG are
    recorded from now on, so that an early one does not end the process. SIGTERM, SIGINT, SIGHUP and
    SIGXCPU raise KeyboardInterrupt while there is nothing to save, and are recorded inside
    `orderly`. There a second SIGINT raises it too, for a user who will not wait. SIGHUP stays
    ignored where the parent ignores it, as nohup does.
    """

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came; 0 while none has."""
        self.newest = 0
        """The last one: a server that drains is ended by it."""
        self._orderly = False
        self._interrupts = 0
        for number in (*NOTED, *ENDING):
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (ignored and number in (signal.SIGHUP, signal.SIGXCPU)):
                signal.signal(number, self._note)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Defer every request to stop until the block is done."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        impatient = number == signal.SIGINT and self._interrupts > 1
        if number in ENDING and (impatient or not self._orderly):
            raise KeyboardInterrupt
        self.number = self.number or number
        self.newest = number
