"""Pinned memory and the streams that fill and empty it: staging.Copies by CuPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.gpu.device_buffer import DeviceBuffer, load_cupy
from mpillm.comm.gpu.staging import StagingSpan
from mpillm.comm.gpu.streams import CallerStream

# One slot is copied down, one is in a host collective, one is copied up.
SLOTS = 3
# Long against the start-up of a copy, short against the whole array, so that copies overlap.
# Not measured yet.
SEGMENT_BYTES = 4 * 1024 * 1024


class Pinned:
    """The staging slots of one communicator on one GPU, with a stream down and a stream up.

    All staged calls of the communicator use them, one at a time. They live as long as the
    communicator: memory freed while a copy up still reads it could become another call's.
    """

    def __init__(self, device: int, least_bytes: int) -> None:
        cupy = load_cupy()
        import cupyx

        self.device, self.cuda, self.slot_bytes = device, cupy.cuda, max(SEGMENT_BYTES, least_bytes)
        with cupy.cuda.Device(device):
            self.downward = cupy.cuda.Stream(non_blocking=True)
            self.upward = cupy.cuda.Stream(non_blocking=True)
            self.filled = [cupy.cuda.Event(disable_timing=True) for _ in range(SLOTS)]
            self.emptied = [cupy.cuda.Event(disable_timing=True) for _ in range(SLOTS)]
            self.memory: list[NDArray[Any]] = [
                cupyx.empty_pinned(self.slot_bytes, np.uint8) for _ in range(SLOTS)
            ]

    def free(self) -> None:
        """Drop the memory when no copy uses it any more."""
        with self.cuda.Device(self.device):
            self.downward.synchronize()
            self.upward.synchronize()
        self.memory = []


class CudaCopies:
    """The copies of one prepared call: staging.Copies."""

    def __init__(
        self, pinned: Pinned, caller: CallerStream, source: DeviceBuffer, target: DeviceBuffer
    ) -> None:
        self._pinned, self._caller, self._source, self._target = pinned, caller, source, target
        self._ended = caller.event()  # after the last copy up
        self.slots = SLOTS

    def begin(self) -> None:
        # Copies up wait too: before the mark the caller may still read what they overwrite.
        with self._pinned.cuda.Device(self._pinned.device):
            self._pinned.downward.wait_event(self._caller.marked)
            self._pinned.upward.wait_event(self._caller.marked)

    def down(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        pinned, runtime = self._pinned, self._pinned.cuda.runtime
        with pinned.cuda.Device(pinned.device):
            # The slot's previous segment must have left it.
            pinned.downward.wait_event(pinned.emptied[slot])
            for span in spans:
                runtime.memcpyAsync(
                    self._host(slot, span),
                    self._source.at(span.device),
                    span.count * self._source.itemsize,
                    runtime.memcpyDeviceToHost,
                    pinned.downward.ptr,
                )
            pinned.filled[slot].record(pinned.downward)

    def arrived(self, slot: int) -> bool:
        return bool(self._pinned.filled[slot].done)

    def await_down(self, slot: int) -> None:
        self._pinned.filled[slot].synchronize()

    def up(self, slot: int, spans: Sequence[StagingSpan]) -> None:
        pinned, runtime = self._pinned, self._pinned.cuda.runtime
        with pinned.cuda.Device(pinned.device):
            for span in spans:
                runtime.memcpyAsync(
                    self._target.at(span.device),
                    self._host(slot, span),
                    span.count * self._target.itemsize,
                    runtime.memcpyHostToDevice,
                    pinned.upward.ptr,
                )
            pinned.emptied[slot].record(pinned.upward)

    def finish(self) -> None:
        with self._pinned.cuda.Device(self._pinned.device):
            self._ended.record(self._pinned.upward)
        self._caller.follow(self._ended)
        self._caller.follow_elsewhere(self._ended)

    def _host(self, slot: int, span: StagingSpan) -> int:
        return int(self._pinned.memory[slot].ctypes.data) + span.host * self._source.itemsize
