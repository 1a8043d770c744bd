"""Persistent collectives: prepared once, started any number of times, several in flight."""

from collections import deque
from collections.abc import Callable

from mpillm.comm.backoff import Backoff
from mpillm.comm.executors.request import Request
from mpillm.errors import CommError


class InFlight:
    """The collectives of one communicator that have started and are not known to be complete."""

    def __init__(self) -> None:
        self.calls: list[PersistentCollective] = []
        self.queue: deque[PersistentCollective] = deque()
        """Those of `calls` that run one at a time, in the order of their starts, the same on all
        ranks.
        """
        self.back_off = Backoff()

    def progress(self) -> None:
        """Progress all calls, without waiting."""
        for call in list(self.calls):
            call.test()

    def wait_all(self) -> None:
        """Return when all calls are complete, or enqueued ahead of the stream's further work."""
        self.progress()
        for call in list(self.calls):
            if call.enqueued:
                call.wait()
        while self.calls:
            self.back_off()
            self.progress()


class PersistentCollective:
    """One prepared collective, as MPI's persistent requests: `run` it, or `start` it and `test` or
    `wait`.

    `algorithm`: the chosen one. `bare`: `run` without the in-flight check, so that benchmarks time
    the MPI library without our overhead. `check` is called at each start, to compare the ranks'
    calls; `mark` notes the caller's place in its CUDA stream. `enqueued`: its `wait` lets the
    current stream wait, and not the host.
    """

    def __init__(
        self,
        in_flight: InFlight,
        algorithm: str,
        request: Request,
        check: Callable[[], None] | None = None,
        mark: Callable[[], None] | None = None,
        enqueued: bool = False,
    ) -> None:
        self.algorithm, self.bare = algorithm, request.run
        self._in_flight, self._request = in_flight, request
        self._check, self._mark, self.enqueued = check, mark, enqueued
        self.done = True
        """Whether the last start is known to be complete."""
        self._began = False

    def run(self) -> None:
        """Run it, and return when this rank's part is complete."""
        if self._in_flight.calls or self._check is not None:
            # The calls in flight must progress meanwhile: another rank may wait for them first.
            self.start().wait()
        else:
            self.bare()

    def start(self) -> "PersistentCollective":
        """Start it and return it; its arrays must not be touched until it is complete. One start at
        a time.
        """
        if not self.done and not self.test():
            raise CommError(
                "a prepared call was started again before it was done; wait for it first"
            )
        if self._check is not None:
            self._check()
        if self._mark is not None:
            self._mark()
        self.done = False
        self._in_flight.calls.append(self)
        if self._request.queued:
            queue = self._in_flight.queue
            queue.append(self)
            self._began = queue[0] is self
        else:
            self._began = True
        if self._began:
            self._request.start()
        return self

    def test(self) -> bool:
        """Progress without waiting; True when it is complete."""
        if not self.done and self._began and self._request.test():
            self._complete()
        return self.done

    def wait(self) -> None:
        """Return when it is complete. All calls in flight progress meanwhile, so ranks may wait in
        any order.
        """
        in_flight = self._in_flight
        while not self.test():
            if self.enqueued or in_flight.calls == [self]:
                self._request.wait()
            else:
                in_flight.back_off()
                in_flight.progress()

    def _complete(self) -> None:
        """Leave the calls in flight; the next of the queue starts."""
        self.done = True
        self._in_flight.calls.remove(self)
        if self._request.queued:
            queue = self._in_flight.queue
            queue.popleft()
            if queue:
                queue[0]._began = True
                queue[0]._request.start()
