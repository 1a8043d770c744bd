"""Pass the streams of a pipeline over channels: from the host's memory, or a GPU's through it.

A GPU's streams go through pinned memory. Copies take their place in the order of the GPU's work, so
the host does not wait for them; a send starts when its copy has arrived. Sends by NCCL would have
to come in one order on both ranks of a pair, and schedules whose rows cross have none.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpillm.comm.channels.channel_set import ChannelSet
from mpillm.models.part_module import Streams


@dataclass(frozen=True)
class StreamShapes:
    """The streams between stages: tensors of `shapes_of(stage, microbatch)`, all of `dtype`.

    `stage`: the one that the streams enter; their gradients leave it in the same shapes.
    """

    shapes_of: Callable[[int, int], tuple[tuple[int, ...], ...]]
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


class HostTransport:
    """Streams of the host's memory: sent from where they are, received where they are used."""

    def __init__(self, channels: ChannelSet, streams: StreamShapes, entered: Sequence[int]) -> None:
        """`entered`: of each channel the stage whose inputs, or their gradients, it carries."""
        self._channels, self._streams, self._entered = channels, streams, entered
        self._posted: dict[int, deque[Streams]] = {}

    def post(self, channel: int, microbatch: int) -> None:
        """Post the receives of a microbatch's streams, in their order."""
        stage = self._entered[channel]
        buffers = tuple(map(self._buffer, self._streams.shapes_of(stage, microbatch)))
        for buffer in buffers:
            self._channels.post_receive(channel, buffer)
        self._posted.setdefault(channel, deque()).append(buffers)

    def receive(self, channel: int) -> Streams:
        """Wait for the oldest posted streams of `channel`."""
        arrived = self._posted[channel].popleft()
        for _ in arrived:
            self._channels.wait(channel)
        return arrived

    def send(self, channel: int, streams: Streams) -> None:
        """Start to send; the streams must not change until `drain`."""
        for stream in streams:
            self._channels.send(channel, stream.contiguous())

    def progress(self) -> None:
        """Start what can start by now, without waiting."""

    def drain(self) -> None:
        """Return when all that was sent has left."""
        self._channels.drain()

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._streams.dtype, device=self._streams.device)


class DeviceTransport(HostTransport):
    """Streams of a GPU, through pinned memory. On a CPU it copies, which tests the same paths."""

    def __init__(self, channels: ChannelSet, streams: StreamShapes, entered: Sequence[int]) -> None:
        super().__init__(channels, streams, entered)
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def receive(self, channel: int) -> Streams:
        # Another rank may need what is still on its way to the host before it can send.
        self._start_sends(wait=True)
        arrived = super().receive(channel)
        # torch reuses a pinned buffer only after the copies from it.
        return tuple(host.to(self._streams.device, non_blocking=True) for host in arrived)

    def send(self, channel: int, streams: Streams) -> None:
        for stream in streams:
            host = self._buffer(tuple(stream.shape))
            host.copy_(stream, non_blocking=True)
            event = None
            if stream.is_cuda:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(stream.device))
            self._leaving.append((channel, host, event))
        self.progress()

    def progress(self) -> None:
        self._start_sends(wait=False)

    def drain(self) -> None:
        self._start_sends(wait=True)
        super().drain()

    def _start_sends(self, wait: bool) -> None:
        """Start the sends whose copies have arrived, in their order; with `wait` all of them."""
        while self._leaving:
            channel, host, event = self._leaving[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                if not wait:
                    return
                event.synchronize()
            self._leaving.popleft()
            self._channels.send(channel, host)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        pinned = torch.cuda.is_available()
        return torch.empty(shape, dtype=self._streams.dtype, pin_memory=pinned)


def make_transport(
    channels: ChannelSet, streams: StreamShapes, entered: Sequence[int]
) -> HostTransport:
    """Make the transport for the device of `streams`. `entered`: see HostTransport."""
    on_host = streams.device is None or streams.device.type == "cpu"
    return (HostTransport if on_host else DeviceTransport)(channels, streams, entered)
