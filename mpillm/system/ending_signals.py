"""Ctrl-C and SIGTERM: leave at once while Python imports a verb; wait while files are removed.

During imports an exception would be raised at any line, and printed with a traceback. This module
loads nothing else of mpillm, so that the signals are caught from the first moment on.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)
# The exit code that a shell reports for a process ended by SIGINT.
INTERRUPTED = 128 + signal.SIGINT


def leave_on_signals() -> None:
    """End the process by SIGINT and SIGTERM, with the code that a shell reports, 128 + signal.

    Called first; nothing is open that must be closed. A signal that the parent ignores, as nohup
    and a shell's background jobs do, stays ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def release_signals() -> None:
    """Give both signals their usual meaning again; done once a verb is loaded and handles them.

    An interrupt that comes within a destructor is raised again outside of it: Python would print
    and forget it.
    """
    sys.unraisablehook = _raise_interrupt_again
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Put both signals off until the block is done; in a thread other than the main one do nothing.

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


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
