"""A thread that progresses messages while this rank computes: most MPI libraries progress only
inside a call.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from mpillm.comm.kernel import WAITING


class Progressing(Protocol):
    """A set of messages in flight, such as a Communicator's."""

    def progress(self) -> None:
        """Progress them, without waiting."""


class ProgressThread:
    """Calls `progress` of `messages` again and again, while it is resumed.

    It sleeps between two polls, so that the computation keeps its core, and holds Python's lock for
    a poll only: torch's backward pass runs without it. MPI must allow calls from several threads
    (MPI_THREAD_MULTIPLE, which mpi4py asks for by default). `begin` is called first, in the thread:
    it may choose a GPU and a stream, which are a thread's own.
    """

    def __init__(self, messages: Progressing, begin: Callable[[], object] | None = None) -> None:
        self._messages, self._begin = messages, begin
        # MPI calls of the two threads must not overlap on one request.
        self.lock = threading.Lock()
        self._wanted = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mpillm-progress", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the thread off while the block calls MPI. Raises the exception that ended the
        thread, if any.
        """
        with self.lock:
            # Not by `check`: this is on the way of every gradient.
            if self._failure is not None:
                raise self._failure
            yield

    def check(self) -> None:
        """Raise the exception that ended the thread, if any."""
        if self._failure is not None:
            raise self._failure

    def resume(self) -> None:
        """Let the thread poll."""
        self._wanted.set()

    def pause(self) -> None:
        """Stop polling; the thread touches no message after this returns."""
        self._wanted.clear()
        with self.paused():
            pass

    def end(self) -> None:
        """Stop for good, and return when the thread has ended."""
        self._ended = True
        self._wanted.set()
        self._thread.join()

    def _work(self) -> None:
        interval_seconds = WAITING["PROGRESS_SECONDS"]
        try:
            if self._begin is not None:
                self._begin()
        except Exception as failure:
            self._failure = failure
            return
        while self._wanted.wait() and not self._ended:
            with self.lock:
                try:
                    # `pause` may have been called between the wait and the lock.
                    if self._wanted.is_set():
                        self._messages.progress()
                except Exception as failure:
                    self._failure = failure
                    return
            time.sleep(interval_seconds)
