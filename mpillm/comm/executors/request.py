"""Requests: the steps of a prepared collective, run one after the other, blocking or not.

A request is persistent in MPI's sense: it can run any number of times. `run` is `start`, then
`wait`; `test` progresses it without waiting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpillm.comm.buffers import Buffer

if TYPE_CHECKING:
    from mpi4py import MPI


class Request(Protocol):
    """One step, or a chain of them. A kernel.Operation is a Request, too."""

    @property
    def queued(self) -> bool:
        """Whether it starts steps on something shared (a team, a communicator) after its own start.

        Ranks must start such steps in one order, so these requests run one at a time, in the order
        of their starts.
        """

    @property
    def run(self) -> Callable[[], object]: ...
    def start(self) -> None: ...
    def test(self) -> bool: ...
    def wait(self) -> None: ...


@dataclass(frozen=True)
class Operands:
    """The arrays of a collective, and the reduction of what arrives."""

    source: Buffer
    target: Buffer
    """`source` itself where the collective is in place."""
    op: str = "sum"
    """One of buffers.REDUCTIONS."""
    root: int = 0

    @property
    def in_place(self) -> bool:
        """Whether source and target are one array."""
        return self.source is self.target


class LocalRequest:
    """Work of this rank alone: copies and scaling."""

    queued = False

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


class MpiRequest:
    """A collective of the MPI library: `blocking` calls it, `starting` its non-blocking form."""

    queued = False

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
    """Requests in order."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._index = len(requests)
        self.queued = any(request.queued for request in requests)

    def run(self) -> None:
        for request in self._requests:
            request.run()

    def start(self) -> None:
        self._index = 0
        if self._requests:
            self._requests[0].start()
        # A schedule after a copy takes its tag now: ranks that test at other times must not take
        # another.
        self.test()

    def test(self) -> bool:
        while self._index < len(self._requests):
            if not self._requests[self._index].test():
                return False
            self._next()
        return True

    def wait(self) -> None:
        while self._index < len(self._requests):
            self._requests[self._index].wait()
            self._next()

    def _next(self) -> None:
        self._index += 1
        if self._index < len(self._requests):
            self._requests[self._index].start()


def chain(*requests: Request) -> Request:
    """Return a single request as it is, several as a ChainRequest."""
    return requests[0] if len(requests) == 1 else ChainRequest(requests)
