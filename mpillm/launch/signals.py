"""Signals that ask a job to stop: from a user, a launcher or a batch system."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and PBS send SIGTERM and the signal of our scripts, SIGUSR1. LSF sends SIGUSR2 at its limit,
# and our scripts SIGURG before it. A terminal sends SIGINT.
NOTED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG)
ENDING = (signal.SIGTERM, signal.SIGINT)


# What ends a process without a word by default: a verb that has nothing to save tidies up instead.
# A closed terminal sends SIGHUP, a limit of processor time SIGXCPU.
INTERRUPTING = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"by {signal_name(number)}")


def interrupt_on_terminate() -> None:
    """Make each signal that asks for an end raise KeyboardInterrupt in the main thread, as SIGINT
    does. What the parent ignores stays ignored: nohup does so with SIGHUP.
    """
    for number in INTERRUPTING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


class StopSignals:
    """Record the signals that ask to stop.

    One a process, made in its main thread before slow imports. SIGUSR1, SIGUSR2 and SIGURG are
    recorded from now on, so that an early one does not end the process. SIGTERM and SIGINT raise
    KeyboardInterrupt while there is nothing to save, and are recorded inside `orderly`. There a
    second SIGINT raises it too, for a user who will not wait.
    """

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came; 0 while none has."""
        self._orderly = False
        self._interrupts = 0
        for number in (*NOTED, *ENDING):
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


def signal_name(number: int) -> str:
    """Return the name of a signal: 10 → `SIGUSR1`."""
    return signal.Signals(number).name
