"""The one interpreter of pipeline schedules: runs a rank's row over MPI, whatever the schedule.

Before an action it takes what the action needs, from this rank or from another by mail; after it, it hands on what was
made. Sends never wait, and receives are posted ahead, so what can be hidden behind computation is; and since each way
between two stages keeps its messages in the order that both rows have them in, which checking.py proves, no message is
named: the row itself tells what arrives.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpillm.comm.channels.channel import HandoverProfile
from mpillm.comm.channels.channel_set import Channel, ChannelSet
from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Axis
from mpillm.errors import CommError
from mpillm.parallel.pipeline.actions import Action, PipelineSchedule
from mpillm.parallel.pipeline.simulate import Span
from mpillm.parallel.pipeline.stage import PipelineStage

# Receives that are posted on each way between two stages: one to fill while another is computed on.
AHEAD = 2


@dataclass(frozen=True)
class Stream:
    """What passes between stages: tensors of `shape_of(microbatch)` and `dtype`."""

    shape_of: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype = torch.float32


class Pipeline:
    """The ranks of `axis`, which run schedules with the stages of `placement` on the same ranks as it has them.

    Every rank of the axis makes it. `nbytes`: of the largest stream. `way`, `profile`, `warn`: see comm/mail.py.
    """

    def __init__(
        self,
        axis: Axis,
        placement: PipelineSchedule,
        nbytes: int,
        way: str = "auto",
        profile: HandoverProfile | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.axis, self.placement = axis, placement
        holders = placement.rank_of
        pairs = [
            (stage, stage + 1)
            for stage in range(placement.stages - 1)
            if holders[stage] != holders[stage + 1]
        ]
        # Behind each action whose result travels there is an edge: of the forwards down, of the gradients up.
        self._edges = {
            way_on: number for number, way_on in enumerate([*pairs, *((b, a) for a, b in pairs)])
        }
        edges = [
            Channel(holders[sender], holders[receiver], nbytes) for sender, receiver in self._edges
        ]
        self._mail = ChannelSet(axis.comm, edges, way=way, profile=profile, warn=warn)

    @property
    def ways(self) -> list[str]:
        """How streams pass between ranks, without repetition."""
        return list(dict.fromkeys(self._mail.ways))

    def run(
        self, schedule: PipelineSchedule, stages: Mapping[int, PipelineStage], stream: Stream
    ) -> list[Span]:
        """Do this rank's row of `schedule` with its `stages`; every rank of the axis calls it with the same schedule.

        Returns when each computed: seconds of time.perf_counter. When it returns, all that was sent is on its way.
        """
        assert schedule.rank_of == self.placement.rank_of
        return _RowExecution(self._mail, self._edges, schedule, self.axis.rank, stages, stream).go()

    def close(self) -> None:
        """Every rank of the axis calls it; nothing runs afterwards."""
        self._mail.free()


class _RowExecution:
    """One rank's row under way."""

    def __init__(
        self,
        mail: ChannelSet,
        edges: Mapping[tuple[int, int], int],
        schedule: PipelineSchedule,
        rank: int,
        stages: Mapping[int, PipelineStage],
        stream: Stream,
    ) -> None:
        self._mail, self._edges, self._schedule = mail, edges, schedule
        self._row, self._stages, self._stream = schedule.rows[rank], stages, stream
        self._here: dict[Action, Tensor] = {}
        self._coming: dict[int, deque[int]] = {}
        self._posted: dict[int, deque[Tensor]] = {}
        for action in self._row:
            edge = self._edge_to(action)
            if edge is not None:
                self._coming.setdefault(edge, deque()).append(action.microbatch)

    def go(self) -> list[Span]:
        for edge in self._coming:
            self._posted[edge] = deque()
            for _ in range(AHEAD):
                self._post(edge)
        spans = [self._act(action) for action in self._row]
        self._mail.drain()
        return spans

    def _act(self, action: Action) -> Span:
        given = self._take(action)
        stage, begin = self._stages[action.stage], time.perf_counter()
        made: Tensor | None = None
        if action.kind == "F":
            made = stage.forward(action.microbatch, given)
        elif action.kind == "B":
            made = stage.backward(action.microbatch, given)
        elif action.kind == "I":
            made = stage.backward_input(action.microbatch, given)
        else:
            stage.backward_weight(action.microbatch)
        end = time.perf_counter()
        if made is not None:
            self._hand_on(action, made)
        return Span(action, begin, end)

    def _edge_to(self, action: Action) -> int | None:
        """By which edge what `action` needs arrives from another rank."""
        needed = self._schedule.needs(action)
        return None if needed is None else self._edges.get((needed.stage, action.stage))

    def _post(self, edge: int) -> None:
        if self._coming[edge]:
            arriving = torch.empty(
                self._stream.shape_of(self._coming[edge].popleft()), dtype=self._stream.dtype
            )
            self._posted[edge].append(arriving)
            self._mail.expect(edge, arriving)

    def _take(self, action: Action) -> Tensor | None:
        needed = self._schedule.needs(action)
        if needed is None or needed.stage == action.stage:
            return None
        edge = self._edge_to(action)
        if edge is None:
            return self._here.pop(needed)
        self._mail.wait(edge)
        arrived = self._posted[edge].popleft()
        self._post(edge)
        return arrived

    def _hand_on(self, action: Action, made: Tensor) -> None:
        wanted = (torch.Size(self._stream.shape_of(action.microbatch)), self._stream.dtype)
        if (made.shape, made.dtype) != wanted:
            raise CommError(
                f"stage {action.stage} made {tuple(made.shape)} of {made.dtype} in {action}, and the stages agreed on "
                f"{tuple(wanted[0])} of {wanted[1]}; mend the stage"
            )
        receiver = self._schedule.feeds(action)
        edge = None if receiver is None else self._edges.get((action.stage, receiver))
        if edge is None:
            self._here[action] = made
        else:
            self._mail.send(edge, made.contiguous())
