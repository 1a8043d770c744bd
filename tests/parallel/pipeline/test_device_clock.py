"""Times of a GPU's work, in seconds of the host's clock; the events here are simulated."""

import itertools
import time

import pytest

from mpillm.parallel.pipeline.actions import Action
from mpillm.parallel.pipeline.device_clock import DeviceClock


class Event:
    """An event of a GPU on which each piece of work takes 10 ms from the first on."""

    numbers = itertools.count()

    def record(self) -> None:
        self.number = next(self.numbers)

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: "Event") -> float:
        assert other.waited
        return 10.0 * (other.number - self.number)


def test_actions_end_as_long_ago_as_the_gpu_says() -> None:
    clock = DeviceClock(Event)
    for microbatch in range(2):
        begin = clock.mark()
        clock.add(Action(0, "F", microbatch), begin, clock.mark())
    before = time.perf_counter()
    one, other = clock.spans()
    after = time.perf_counter()
    assert [str(one.action), str(other.action)] == ["0F0", "0F1"]
    assert before - 0.04 <= one.begin <= after - 0.04
    assert one.end - one.begin == pytest.approx(0.01)
    assert other.begin - one.end == pytest.approx(0.01)
    assert other.end == pytest.approx(one.begin + 0.03)
