"""Order between a caller's CUDA stream and what a collective does, kept by events, never by waiting for a device."""

from collections.abc import Callable
from typing import Any

from mpillm.comm.executors.request import Request
from mpillm.comm.gpu.device_buffer import DeviceBuffer


class Caller:
    """The stream on which the caller works: `mark` notes which it is, and what it has been given so far."""

    def __init__(self, buffer: DeviceBuffer) -> None:
        self._current = buffer.current_stream
        self._cuda = buffer.library.cuda
        self._device = buffer.device
        self.marked = self.event()
        self.stream = 0

    def event(self) -> Any:
        """A new event of the caller's GPU."""
        with self._cuda.Device(self._device):
            return self._cuda.Event(disable_timing=True)

    def mark(self) -> None:
        self.stream = self._current()
        self.record(self.marked)

    def record(self, event: Any) -> None:
        """Set `event` behind all that the stream has been given so far."""
        with self._cuda.Device(self._device):
            self._cuda.runtime.eventRecord(event.ptr, self.stream)

    def follow(self, event: Any) -> None:
        """What the stream is given from now on waits for `event`."""
        self._follow(self.stream, event)

    def follow_elsewhere(self, event: Any) -> None:
        """The same for the stream that is current now, of who polls or waits, where that is another one."""
        current = self._current()
        if current != self.stream:
            self._follow(current, event)

    def _follow(self, stream: int, event: Any) -> None:
        with self._cuda.Device(self._device):
            self._cuda.runtime.streamWaitEvent(stream, event.ptr)

    def doing(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work` as a call in which the caller's stream is CuPy's current one."""

        def on_stream() -> None:
            with self._cuda.Device(self._device), stream_at(self._cuda, self.stream, self._device):
                work()

        return on_stream


class _EventHandle:
    """A stream of another library, by the protocol that CuPy 14 asks for."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def stream_at(cuda: Any, pointer: int, device: int) -> Any:
    """A stream by its handle, as CuPy takes it; `cuda` is the module cupy.cuda."""
    wrap = getattr(cuda.Stream, "from_external", None)
    return cuda.ExternalStream(pointer, device) if wrap is None else wrap(_EventHandle(pointer))


class Ordered:
    """A whole collective on a GPU: `stage`, which reads and writes only what `caller` has given it leave to.

    `mark` comes first: when a call begins, its place in the caller's stream is noted, even if it must queue.
    """

    def __init__(self, caller: Caller, stage: Request) -> None:
        self._caller, self._stage = caller, stage
        self.mark = caller.mark
        self.start, self.test, self.wait = stage.start, stage.test, stage.wait

    def run(self) -> None:
        self._caller.mark()
        self._stage.run()


class Enqueued:
    """Work of which all is given to the caller's stream at once, and done there in its turn: NCCL's, and copies.

    `run` returns when it is given. `test` asks an event; `wait` lets the stream of who waits wait for it.
    """

    def __init__(self, caller: Caller, enqueue: Callable[[], object]) -> None:
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
        self._ended = self._ended or bool(self._end.done)
        return self._ended

    def wait(self) -> None:
        if not self._ended:
            self._caller.follow_elsewhere(self._end)
            self._ended = True


class Reached:
    """Nothing but waiting, on the host, until the caller's stream has come here: MPI knows no streams."""

    def __init__(self, caller: Caller) -> None:
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
        self._event.synchronize()


class Within:
    """A stage whose every step is taken with a GPU and a stream of its own as CuPy's current ones."""

    def __init__(self, cuda: Any, device: int, stream: Any, stage: Request) -> None:
        self._cuda, self._device, self._stream, self._stage = cuda, device, stream, stage

    def _step(self, step: Callable[[], Any]) -> Any:
        with self._cuda.Device(self._device), self._stream:
            return step()

    def run(self) -> None:
        self._step(self._stage.run)

    def start(self) -> None:
        self._step(self._stage.start)

    def test(self) -> bool:
        return bool(self._step(self._stage.test))

    def wait(self) -> None:
        self._step(self._stage.wait)
