"""Order between the caller's CUDA stream and a collective's work, by events.

The host waits for an event at most, never for a whole device: other streams keep computing.
"""

from collections.abc import Callable
from typing import Any

from mpillm.comm.executors.request import Request
from mpillm.comm.gpu.device_buffer import DeviceBuffer


class CallerStream:
    """The stream on which the caller works; `mark` records it and the end of its work so far."""

    def __init__(self, buffer: DeviceBuffer) -> None:
        self._current = buffer.current_stream
        self._cuda = buffer.library.cuda
        self._device = buffer.device
        # One event a prepared call: each run records it again.
        self.marked = self.event()
        self.stream = 0

    def event(self) -> Any:
        """Make an event on the caller's GPU, without timing, which would make it slower."""
        with self._cuda.Device(self._device):
            return self._cuda.Event(disable_timing=True)

    def mark(self) -> None:
        self.stream = self._current()
        self.record(self.marked)

    def record(self, event: Any) -> None:
        """Record `event` after all work enqueued in the stream so far."""
        with self._cuda.Device(self._device):
            # By raw handle: the stream may be torch's, of which CuPy has no object.
            self._cuda.runtime.eventRecord(event.ptr, self.stream)

    def follow(self, event: Any) -> None:
        """Let the stream's further work wait for `event`."""
        self._follow(self.stream, event)

    def follow_elsewhere(self, event: Any) -> None:
        """Let the stream that is current now wait for `event`, where it is another stream.

        A rank may start a collective in one stream and wait for it in another.
        """
        # The default stream has handle 0, so handles are compared, not their truth.
        current = self._current()
        if current != self.stream:
            self._follow(current, event)

    def _follow(self, stream: int, event: Any) -> None:
        with self._cuda.Device(self._device):
            self._cuda.runtime.streamWaitEvent(stream, event.ptr)

    def doing(self, work: Callable[[], object]) -> Callable[[], None]:
        """Wrap `work` so that the caller's stream is CuPy's current one while it runs."""

        def on_stream() -> None:
            with self._cuda.Device(self._device), stream_at(self._cuda, self.stream, self._device):
                work()

        return on_stream


class _ForeignStream:
    """A stream of another library, by the protocol that CuPy 14 requires."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def stream_at(cuda: Any, pointer: int, device: int) -> Any:
    """Wrap a stream's handle for CuPy; `cuda` is the module cupy.cuda."""
    wrap = getattr(cuda.Stream, "from_external", None)
    return cuda.ExternalStream(pointer, device) if wrap is None else wrap(_ForeignStream(pointer))


class OrderedRequest:
    """A whole collective on a GPU, ordered after the caller's work by `mark`.

    `mark` comes first: it records the call's place in the caller's stream, even if the call must
    queue.
    """

    def __init__(self, caller: CallerStream, request: Request, queued: bool) -> None:
        """Order `request` after the caller's work; `queued`: see Request, False for NCCL."""
        self._caller, self._request, self.queued = caller, request, queued
        self.enqueued = isinstance(request, EnqueuedRequest)
        """Whether a wait is one of the stream, and not of the host."""
        self.mark = caller.mark
        self.start, self.test, self.wait = request.start, request.test, request.wait

    def run(self) -> None:
        self._caller.mark()
        self._request.run()


class EnqueuedRequest:
    """Work enqueued in the caller's stream as a whole: NCCL's collectives, and copies.

    `run` returns when it is enqueued. `test` queries an event; `wait` lets the current stream wait
    for that event.
    """

    queued = False

    def __init__(self, caller: CallerStream, enqueue: Callable[[], object]) -> None:
        self._caller, self._enqueue = caller, enqueue
        self._end = caller.event()
        self._ended = True

    def run(self) -> None:
        self._enqueue()

    def start(self) -> None:
        self._enqueue()
        self._caller.record(self._end)
        self._ended = False

    def test(self) -> bool:
        # A query, never a wait: Test() must not block.
        self._ended = self._ended or bool(self._end.done)
        return self._ended

    def wait(self) -> None:
        if not self._ended:
            self._caller.follow_elsewhere(self._end)
            self._ended = True


class StreamReachedRequest:
    """Wait on the host until the caller's stream has reached this point: MPI knows no streams."""

    queued = False

    def __init__(self, caller: CallerStream) -> None:
        self._caller = caller
        self._event = caller.event()

    def run(self) -> None:
        self.start()
        self.wait()

    def start(self) -> None:
        self._caller.record(self._event)

    def test(self) -> bool:
        return bool(self._event.done)

    def wait(self) -> None:
        # It blocks the host thread, not the device; other streams keep computing.
        self._event.synchronize()


class OwnStreamRequest:
    """A request whose every step runs with a GPU and a stream of its own as CuPy's current ones."""

    queued = False

    def __init__(self, cuda: Any, device: int, stream: Any, request: Request) -> None:
        self._cuda, self._device, self._stream, self._request = cuda, device, stream, request

    def _step(self, step: Callable[[], Any]) -> Any:
        with self._cuda.Device(self._device), self._stream:
            return step()

    def run(self) -> None:
        self._step(self._request.run)

    def start(self) -> None:
        self._step(self._request.start)

    def test(self) -> bool:
        return bool(self._step(self._request.test))

    def wait(self) -> None:
        self._step(self._request.wait)
