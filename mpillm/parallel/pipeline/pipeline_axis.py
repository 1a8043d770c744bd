"""The pipeline axis: its ranks share the blocks of the model."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes, ParallelAxis, RankTimes


class PipelineAxis(ParallelAxis):
    """The axis whose ranks hold consecutive blocks of the model."""

    name: ClassVar[str] = "pipeline"
    cuts_weights: ClassVar[bool] = True
    optional: ClassVar[bool] = False

    def shares(self, model: ModelSpec, batch: int) -> str:
        return f"{model.blocks} layer{'s' * (model.blocks > 1)}"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if size <= model.blocks:
            return ""
        return f"{model.blocks} layers cannot be shared by {size} stages"

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        """Count the stream of a rank's share of the batch, and its gradient, once through each
        stage.
        """
        if sizes[self.name] == 1:
            return 0.0
        # Forward and backward: each stage of the rank sends its stream, and a gradient of its size.
        # The ranks of the context and tensor axes have a part of the stream each.
        sharing = ("data", "island", "context", "tensor")
        rows = batch / math.prod(sizes.get(axis, 1) for axis in sharing)
        stream = element.stream * rows * model.stream_features
        return 2 * stream * chunks

    def wait_seconds(self, times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
        """Return the mean time in which a rank of a pipeline does not compute, between its first
        pass and its last.
        """
        if len(groups[0]) == 1:
            return 0.0
        waits = [times.window(group) - times.busy[list(group)].mean() for group in groups]
        return float(sum(waits) / len(waits))


def measured_bubble(times: RankTimes, groups: Sequence[Sequence[int]]) -> float:
    """Return waiting over computing, as simulate.Timeline counts it, averaged over the pipelines; 0
    without one.
    """
    if len(groups[0]) == 1:
        return 0.0
    bubbles = [times.window(group) / times.busy[list(group)].mean() - 1 for group in groups]
    return float(sum(bubbles) / len(bubbles))
