"""The context axis: its ranks share the positions of each sequence, with the same weights."""

from collections.abc import Mapping
from typing import ClassVar

from mpillm.models.spec import ModelSpec
from mpillm.parallel.context.context_traffic import attention_bytes, choose_kind, own_heads
from mpillm.parallel.parallel_axis import MessageBytes, ParallelAxis, mean_parameters


class ContextAxis(ParallelAxis):
    """The axis whose ranks hold chunks of each sequence (zigzag.py)."""

    name: ClassVar[str] = "context"
    shares_tokens: ClassVar[bool] = True

    def shares(self, model: ModelSpec, batch: int) -> str:
        return f"a context of {model.context:,} positions"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if size == 1:
            return ""
        if model.whole_sequences:
            return f"{size} context ranks cannot share a sequence: {model.whole_sequences}"
        chunks = 2 * size
        rest = model.context % chunks
        if not rest:
            return ""
        below, above = model.context - rest, model.context - rest + chunks
        near = f"{below:,} or {above:,}" if below else f"{above:,}"
        return (
            f"a context of {model.context:,} positions cannot be cut into two equal chunks for "
            f"each of {size} context ranks (model.context = {near} can)"
        )

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        """Count what attention moves forward and backward.

        Sums of gradients over both axes are added, less what the data axis counts.
        """
        size = sizes.get(self.name, 1)
        if size == 1:
            return 0.0
        data, pipeline = sizes.get("data", 1), sizes.get("pipeline", 1)
        tensor, shape = sizes.get("tensor", 1), model.attention_shape
        rows, layers = batch / (data * sizes.get("island", 1)), model.blocks / pipeline
        kind = choose_kind(element.context_kind, size, shape, tensor, element.device)
        own = own_heads(shape, tensor)
        # A ring adds up gradients of keys and values in float32.
        each = attention_bytes(kind, size, own, model.context, element.stream)
        gradients = element.gradient * mean_parameters(model, sizes)
        return rows * layers * sum(each) + element.sends * gradients * (
            1 / data - 1 / (data * size)
        )
