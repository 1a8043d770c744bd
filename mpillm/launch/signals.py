"""Signals that end a job: a user, a launcher or a batch system asks, and a run that can stops in good order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and PBS send SIGTERM and what one asks for (USR1 in our scripts), LSF SIGUSR2 at its limit and SIGURG before
# it, a terminal SIGINT.
NOTED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG)
ENDING = (signal.SIGTERM, signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def interrupt_on_terminate() -> None:
    """From now on SIGTERM raises KeyboardInterrupt in the main thread, as SIGINT does."""
    signal.signal(signal.SIGTERM, _interrupt)


class StopSignals:
    """Notes the signals that ask to stop. One a process, made in its main thread before anything slow is imported.

    SIGUSR1, SIGUSR2 and SIGURG are noted from now on, so that none that comes early ends the process. SIGTERM and
    SIGINT raise KeyboardInterrupt as long as there is nothing to save, and are noted inside `orderly`; there a second
    SIGINT raises it too, for a person who will not wait.
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
        """While the block runs, whoever asks to stop waits until it is done."""
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
    """10 → `SIGUSR1`."""
    return signal.Signals(number).name
