"""A rank's share of a model under training: its stages, their gradients, and what ties them to the other ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpillm.comm.communicator import silent
from mpillm.comm.mesh import Mesh
from mpillm.machine.cluster_profile import ClusterProfile
from mpillm.models.config import DecoderConfig
from mpillm.models.decoder import Decoder, create
from mpillm.parallel.data.replicated import GradientBuckets
from mpillm.parallel.pipeline.catalog import forward_only
from mpillm.parallel.pipeline.executor import Pipeline, Stream
from mpillm.parallel.pipeline.simulate import Span
from mpillm.parallel.pipeline.stage import Batch, ModelStage, ScoringStage
from mpillm.parallel.pipeline.tying import Tie
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.step_plan import StepPlan


@dataclass(frozen=True)
class Passes:
    """What a batch's passes left: the loss of each microbatch where the last stage is, else none; and when the rank
    computed.
    """

    losses: list[float]
    spans: list[Span]
    ended: float
    """When the last pass had ended and sums began: seconds of perf_counter."""
    summed: float
    """When the gradients were summed."""


class ShardedModel:
    """Every rank of `mesh` makes it, with the same arguments, and calls its methods together with the others."""

    def __init__(
        self,
        config: DecoderConfig,
        seed: int,
        mesh: Mesh,
        layout: StepPlan,
        settings: ParallelSettings,
        *,
        fixed_order: bool = False,
        autocast: torch.dtype | None = None,
        profile: ClusterProfile | None = None,
        scored_rows: int = 1,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """`scored_rows`: the most sequences at once in `score`. `profile`, `warn`: as in comm/group.py."""
        self.config, self.mesh, self.layout, self.autocast = config, mesh, layout, autocast
        axis, schedule = mesh.axis("pipeline"), layout.schedule
        self.parts: dict[int, Decoder] = {
            stage: create(config, seed, part=layout.parts[stage])
            for stage in schedule.stages_of(axis.rank)
        }
        parts = list(self.parts.values())
        # A single stage ties by itself, unless its sums are to be those of several.
        loose = config.tied and (schedule.stages > 1 or fixed_order)
        self._tie = Tie(parts, axis, warn) if loose else None
        self.buckets = GradientBuckets(
            [part.parameters() for part in parts],
            mesh.axis("data"),
            settings,
            profile,
            warn,
            fixed_order=fixed_order,
        )
        self._stages = {
            stage: ModelStage(part, number, self.buckets, autocast)
            for number, (stage, part) in enumerate(self.parts.items())
        }
        nbytes = 4 * max(layout.microbatch, scored_rows) * config.context * config.width
        self.pipeline = Pipeline(axis, schedule, nbytes, settings.handover, profile, warn)

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): the ranks of a pipeline take the i-th of n shares of what is scored."""
        data = self.mesh.axis("data")
        return data.rank, data.size

    @property
    def begins(self) -> bool:
        return any(part.begins for part in self.parts.values())

    @property
    def ends(self) -> bool:
        return any(part.ends for part in self.parts.values())

    def named_weights(self) -> dict[str, nn.Parameter]:
        """What this rank trains, by its names in the whole model. A tied head that shares the embedding's memory is
        left out; a copy of it, on another rank, is there as the embedding.
        """
        followers = self._tie.followers if self._tie else []
        return {
            name: weight
            for part in self.parts.values()
            for name, weight in part.named_weights()
            if not any(weight is follower for follower in followers)
        }

    def train(self, batch: Batch) -> Passes:
        """Leave the gradients of the global batch, summed over all ranks, in `grad` of the weights.

        `batch`: the rank's share. All ranks of a pipeline are given the same rows of it.
        """
        self.buckets.zero()
        for stage in self._stages.values():
            stage.begin(batch)
        microbatch, context, width = self.layout.microbatch, self.config.context, self.config.width
        stream = Stream(lambda number: (microbatch, context, width))
        spans = self.pipeline.run(self.layout.schedule, self._stages, stream)
        ended = time.perf_counter()
        self.buckets.reduce()
        if self._tie is not None:
            self._tie.reduce()
        losses = [stage.losses for stage in self._stages.values() if stage.losses]
        by_number = (
            [losses[0][number] for number in range(self.layout.microbatches)] if losses else []
        )
        return Passes(by_number, spans, ended, time.perf_counter())

    def clip_(self, max_norm: float) -> float:
        """Scale the gradients of the whole model to a norm of `max_norm` at most (0: don't); return what it was."""
        twins = self._tie.twins if self._tie else []
        return self.buckets.clip_(max_norm or math.inf, self.mesh.comm, twins)

    def score(
        self,
        count: int,
        read: Callable[[int], Tensor],
        shape_of: Callable[[int], tuple[int, int]],
        done: Callable[[], None],
    ) -> dict[int, float]:
        """The summed loss of each of `count` batches, where the last stage is; elsewhere none.

        `read(number)`: the ids (B, T + 1), whose `shape_of(number)` is (B, T). `done` is called after each, on the
        ranks that begin the model.
        """
        if not count:
            return {}
        stages = {
            stage: ScoringStage(part, read, self.autocast, done)
            for stage, part in self.parts.items()
        }
        stream = Stream(lambda number: (*shape_of(number), self.config.width))
        for part in self.parts.values():
            part.eval()
        self.pipeline.run(forward_only(self.layout.schedule, count), stages, stream)
        for part in self.parts.values():
            part.train()
        return {number: loss for stage in stages.values() for number, loss in stage.losses.items()}

    def close(self) -> None:
        """Give shared memory and communicators back."""
        self.pipeline.close()
        if self._tie is not None:
            self._tie.close()
        self.buckets.close()
