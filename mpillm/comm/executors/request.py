"""What a prepared collective is made of: stages that run one after the other, blocking or not.

A stage can be run any number of times. `run` is `start`, then `wait`; `test` moves on without waiting.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mpi4py import MPI


class Request(Protocol):
    """A kernel.Operation is one, too."""

    @property
    def run(self) -> Callable[[], object]: ...
    def start(self) -> None: ...
    def test(self) -> bool: ...
    def wait(self) -> None: ...


class Executor(Protocol):
    """A list of rounds, to begin under a tag and carry on: one of lockstep.py or interpreter.py."""

    def begin(self, tag: int) -> None: ...
    def progress(self) -> bool: ...
    def wait(self) -> None: ...


class LocalRequest:
    """Work of this rank alone: copies and scaling."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def run(self) -> None:
        self._work()

    def start(self) -> None:
        self._work()

    def test(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class ScheduleRequest:
    """A list algorithm; each run is given a tag."""

    def __init__(self, steps: Executor, next_tag: Callable[[], int]) -> None:
        self._steps, self._next_tag = steps, next_tag
        self.test, self.wait = steps.progress, steps.wait

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        self._steps.begin(self._next_tag())


class MpiRequest:
    """A collective of the MPI library: `blocking` calls it, `starting` its non-blocking form."""

    def __init__(
        self,
        blocking: Callable[[], object],
        starting: Callable[[], "MPI.Request | Sequence[MPI.Request]"],
    ) -> None:
        self.run = blocking
        self._starting = starting
        self._requests: list[MPI.Request] = []

    def start(self) -> None:
        started = self._starting()
        self._requests = list(started) if isinstance(started, Sequence) else [started]

    def test(self) -> bool:
        while self._requests and self._requests[0].Test():
            self._requests.pop(0)
        return not self._requests

    def wait(self) -> None:
        for request in self._requests:
            request.Wait()
        self._requests = []


class ChainRequest:
    """Stages in order."""

    def __init__(self, stages: Sequence[Request]) -> None:
        self._stages = stages
        self._index = len(stages)

    def run(self) -> None:
        for stage in self._stages:
            stage.run()

    def start(self) -> None:
        self._index = 0
        if self._stages:
            self._stages[0].start()
        # A list behind a copy takes its tag now, on every rank, and not when someone first looks.
        self.test()

    def test(self) -> bool:
        while self._index < len(self._stages):
            if not self._stages[self._index].test():
                return False
            self._next()
        return True

    def wait(self) -> None:
        while self._index < len(self._stages):
            self._stages[self._index].wait()
            self._next()

    def _next(self) -> None:
        self._index += 1
        if self._index < len(self._stages):
            self._stages[self._index].start()


def chain(*stages: Request) -> Request:
    """One stage as it is, several as a Chain."""
    return stages[0] if len(stages) == 1 else ChainRequest(stages)
