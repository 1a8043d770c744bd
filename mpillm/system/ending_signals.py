"""Signals that ask for an end: leave at once while Python imports a verb, interrupt it later.

During imports an exception would be raised at any line, and printed with a traceback. This module
loads nothing else of mpillm, so that the signals are caught from the first moment on.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What ends a process without a word by default: a verb that has nothing to save tidies up instead.
# A closed terminal sends SIGHUP, a limit of processor time SIGXCPU, batch systems the others.
ENDING = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# The signals that have raised KeyboardInterrupt in this process: a signal has no other place.
_CAME: list[int] = []
# The exit code of every interrupted verb; a shell reports it for a process ended by SIGINT.
INTERRUPTED = 128 + signal.SIGINT


def leave_on_signals() -> None:
    """End the process at each signal of ENDING, with the code INTERRUPTED.

    Called first; nothing is open that must be closed. A signal that the parent ignores, as nohup
    and a shell's background jobs do, stays ignored.
    """
    _handle(_leave)


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt in the main thread at each signal of ENDING, once a verb is loaded.

    What the parent ignores stays ignored. An interrupt that comes within a destructor is raised
    again outside of it: Python would print and forget it.
    """
    sys.unraisablehook = _raise_interrupt_again
    _handle(_interrupt)


def exit_by_code() -> None:
    """Let Python exit with the code of a SystemExit, after an interrupt that was handled.

    Python notes a KeyboardInterrupt that leaves the code of `exec(text)`, which makes each
    dataclass. It then ends itself by SIGINT at the exit, even if the exception was caught. The next
    `exec(text)` clears that note.
    """
    exec("")


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """Return the name of a signal: 10 → `SIGUSR1`."""
    return signal.Signals(number).name


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Put these signals off until the block is done; do nothing outside of the main thread.

    For short blocks that must not be cut in two, such as making a folder and noting its name.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda came_now, frame: came.append(came_now))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])


def _raise_interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # A moment later: a signal to itself would be handled within this hook.
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def interrupt_that_came() -> KeyboardInterrupt | None:
    """Return the interrupt of the last signal of `interrupt_on_signals`; None without any.

    Compiled code that calls Python may turn it into an exception of its own.
    """
    return _as_interrupt(_CAME[-1]) if _CAME else None


def _as_interrupt(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt("" if number == signal.SIGINT else f"by {signal_name(number)}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    _CAME.append(number)
    raise _as_interrupt(number)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
