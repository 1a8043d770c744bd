"""A thread that moves collectives on while this rank computes: nothing progresses by itself in most MPI libraries."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progressing(Protocol):
    """What has something under way, such as a Group."""

    def progress(self) -> None:
        """Move it on, without waiting."""


class ProgressThread:
    """Moves what is under way in `group` on, again and again, while it is resumed.

    It sleeps between two looks, so that the computation keeps its core, and takes Python's lock for a look only: the
    backward pass of torch runs without it. MPI must allow calls from several threads, which mpi4py asks for by default.
    """

    def __init__(self, group: Progressing, interval_seconds: float) -> None:
        self._group, self._interval_seconds = group, interval_seconds
        self.lock = threading.Lock()
        self._wanted = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mpillm-progress", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For calls of the group from another thread: one at a time. Raises what the thread failed of."""
        with self.lock:
            self.check()
            yield

    def check(self) -> None:
        """Raise the exception that ended the thread, if any."""
        if self._failure is not None:
            raise self._failure

    def resume(self) -> None:
        self._wanted.set()

    def pause(self) -> None:
        """When this returns the thread has let go of the group."""
        self._wanted.clear()
        with self.paused():
            pass

    def end(self) -> None:
        """Stop for good, and return when the thread has ended."""
        self._ended = True
        self._wanted.set()
        self._thread.join()

    def _work(self) -> None:
        while self._wanted.wait() and not self._ended:
            with self.lock:
                try:
                    if self._wanted.is_set():
                        self._group.progress()
                except Exception as failure:
                    self._failure = failure
                    return
            time.sleep(self._interval_seconds)
