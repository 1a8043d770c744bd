"""The progress thread: what it calls, and where."""

import threading
import time

import pytest

from mpillm.comm.progress_thread import ProgressThread


class Noted:
    """Messages that note which threads progress them."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.polled = threading.Event()

    def progress(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.polled.set()


def test_it_begins_in_its_own_thread_before_it_polls() -> None:
    messages, began = Noted(), []
    thread = ProgressThread(
        messages, lambda: began.append((threading.current_thread().name, len(messages.threads)))
    )
    thread.resume()
    assert messages.polled.wait(10)
    thread.pause()
    count = len(messages.threads)
    time.sleep(0.02)
    assert len(messages.threads) == count
    thread.end()
    assert began == [("mpillm-progress", 0)]
    assert set(messages.threads) == {"mpillm-progress"}


def test_a_beginning_that_fails_is_reported() -> None:
    def fails() -> None:
        raise RuntimeError("no such GPU")

    thread = ProgressThread(Noted(), fails)
    thread.resume()
    thread.end()
    with pytest.raises(RuntimeError, match="no such GPU"):
        thread.check()
    with pytest.raises(RuntimeError, match="no such GPU"), thread.paused():
        pass
