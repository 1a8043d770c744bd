"""Time a GPU's work by events: the calls that enqueue it return long before it is done."""

import time
from collections.abc import Callable
from typing import Any

import torch

from mpillm.parallel.pipeline.actions import Action
from mpillm.parallel.pipeline.simulate import Span


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceClock:
    """The times of the actions of one run of a schedule, on the current stream of a GPU.

    `make_event`: torch's events with times; tests have others.
    """

    def __init__(self, make_event: Callable[[], Any] = _timing_event) -> None:
        self._make_event = make_event
        self._actions: list[tuple[Action, Any, Any]] = []

    def mark(self) -> Any:
        """Record an event after all work that the stream has so far."""
        event = self._make_event()
        event.record()
        return event

    def add(self, action: Action, begin: Any, end: Any) -> None:
        """Note an action with the marks of its begin and end."""
        self._actions.append((action, begin, end))

    def spans(self) -> list[Span]:
        """Return the actions with their times, in seconds of time.perf_counter.

        It waits for the stream. Call it where the host has waited anyway: then the stream has
        nothing left to do, and the two clocks are compared within some 20 µs.
        """
        last = self.mark()
        last.synchronize()
        now = time.perf_counter()

        def time_of(event: Any) -> float:
            # elapsed_time is in milliseconds.
            return now - float(event.elapsed_time(last)) / 1e3

        return [Span(action, time_of(begin), time_of(end)) for action, begin, end in self._actions]
