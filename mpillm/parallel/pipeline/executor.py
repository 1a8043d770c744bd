"""The executor of pipeline schedules: runs one rank's row over MPI, whatever the schedule.

Ahead of an action it takes the streams that the action needs, from this rank or from a channel;
afterwards it passes the result on. Sends never block, and receives are posted ahead, so
communication overlaps with computation. Each channel keeps its messages in the order in which both
rows have them, which check.py proves. So no message carries a name: the row itself says what
arrives.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.errors import CommError
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.models.part_module import Streams
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule, RoutedAction, RoutedRow
from mpillm.parallel.pipeline.device_clock import DeviceClock
from mpillm.parallel.pipeline.simulate import Span
from mpillm.parallel.pipeline.stage import PipelineStage
from mpillm.parallel.pipeline.stream_transport import (
    HostTransport,
    StreamShapes,
    make_transport,
)

# Microbatches whose receives are posted on each channel: one to fill while another is computed on.
AHEAD = 2


class Pipeline:
    """The ranks of `axis`, which run schedules with the stages of `placement` on the same ranks as
    it has them.

    Every rank of the axis makes it. `nbytes`: of the largest stream. `way`, `profile`, `warn`: see
    ChannelSet.
    """

    def __init__(
        self,
        axis: Axis,
        placement: PipelineSchedule,
        nbytes: int,
        way: str = "auto",
        profile: ClusterProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.axis, self.placement = axis, placement
        rank_of = placement.rank_of
        channels = [Channel(rank_of[a], rank_of[b], nbytes) for a, b in placement.channels]
        self._channels = ChannelSet(
            axis.comm, channels, way=way, profile=profile, warn=warn, node_map=axis.node_map
        )
        self._clock: DeviceClock | None = None
        self._transport: HostTransport | None = None

    @property
    def ways(self) -> list[str]:
        """How streams pass between ranks, without repetition."""
        return list(dict.fromkeys(self._channels.ways))

    def run(
        self,
        schedule: PipelineSchedule,
        stages: Mapping[int, PipelineStage],
        streams: StreamShapes,
    ) -> list[Span]:
        """Run this rank's row of `schedule` with its `stages`. Every rank of the axis calls it,
        with one schedule.

        Returns when each action computed, in seconds of time.perf_counter; on a GPU, when it was
        enqueued (see `device_spans`). Then all sends are complete or in flight.
        """
        assert schedule.rank_of == self.placement.rank_of
        row = schedule.routed_row(self.axis.rank)
        # Activations enter the later stage of a channel; gradients leave it.
        entered = [max(ends) for ends in schedule.channels]
        transport = self._transport = make_transport(self._channels, streams, entered)
        on_gpu = streams.device is not None and streams.device.type == "cuda"
        self._clock = DeviceClock() if on_gpu else None
        execution = _RowExecution(transport, row, stages, streams, self._clock)
        spans = [execution.execute(routed) for routed in row.actions]
        # Sent streams are freed when this returns, so their bytes must be on their way.
        transport.drain()
        self._transport = None
        return spans

    def progress(self) -> None:
        """Start the sends that can start by now, for a stage that waits for ranks of other axes."""
        if self._transport is not None:
            self._transport.progress()
        self._channels.progress()

    def device_spans(self) -> list[Span]:
        """Return when a GPU computed each action of the last run; empty on the CPU.

        It waits for the GPU.
        """
        return [] if self._clock is None else self._clock.spans()

    def close(self) -> None:
        """Free the channels. Every rank of the axis calls it, last."""
        self._channels.free()


class _RowExecution:
    """The execution of one rank's row of a schedule."""

    def __init__(
        self,
        transport: HostTransport,
        row: RoutedRow,
        stages: Mapping[int, PipelineStage],
        streams: StreamShapes,
        clock: DeviceClock | None,
    ) -> None:
        self._transport, self._stages, self._streams = transport, stages, streams
        self._clock = clock
        # Results that another stage of this rank takes.
        self._local: dict[Action, Streams] = {}
        self._arriving = {channel: deque(found) for channel, found in row.arrivals.items()}
        # Posted before the first action: a message never waits for its receive.
        for channel in self._arriving:
            for _ in range(AHEAD):
                self._post(channel)

    def execute(self, routed: RoutedAction) -> Span:
        """Take the input of an action, compute, and pass the result on; return when it computed."""
        action = routed.action
        given: Streams = ()
        if routed.receive_from is not None:
            given = self._receive(routed.receive_from)
        elif routed.local_input is not None:
            given = self._local.pop(routed.local_input)
        mark = self._clock.mark() if self._clock else None
        stage, begin = self._stages[action.stage], time.perf_counter()
        result: Streams = ()
        if action.kind == "F":
            result = stage.forward(action.microbatch, given)
        elif action.kind == "B":
            result = stage.backward(action.microbatch, given)
        elif action.kind == "I":
            result = stage.backward_input(action.microbatch, given)
        else:
            stage.backward_weight(action.microbatch)
        end = time.perf_counter()
        if self._clock:
            self._clock.add(action, mark, self._clock.mark())
        self._transport.progress()
        if result:
            self._pass_on(routed, result)
        return Span(action, begin, end)

    def _post(self, channel: int) -> None:
        """Post the receives of the next microbatch on `channel`, if any is left."""
        if self._arriving[channel]:
            self._transport.post(channel, self._arriving[channel].popleft())

    def _receive(self, channel: int) -> Streams:
        """Wait for the oldest posted streams of `channel`."""
        arrived = self._transport.receive(channel)
        # The next receive is posted before the rank computes, so that it overlaps.
        self._post(channel)
        return arrived

    def _pass_on(self, routed: RoutedAction, result: Streams) -> None:
        action, dtype = routed.action, self._streams.dtype
        entered = action.stage + (action.kind == "F")
        shapes = self._streams.shapes_of(entered, action.microbatch)
        made = tuple(tuple(stream.shape) for stream in result)
        if made != shapes or any(stream.dtype != dtype for stream in result):
            raise CommError(
                f"stage {action.stage} made streams of {made} and "
                f"{[str(s.dtype) for s in result]} in {action}, and the stages agreed on "
                f"{shapes} of {dtype}; correct the stage"
            )
        if routed.send_to is None:
            self._local[action] = result
            return
        self._transport.send(routed.send_to, result)
