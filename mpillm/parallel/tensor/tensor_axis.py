"""The tensor axis: its ranks share the heads, hidden features and vocabulary of each layer."""

import math
from collections.abc import Mapping
from typing import ClassVar

from mpillm.models.block_settings import BlockSettings
from mpillm.models.spec import ModelSpec
from mpillm.parallel.parallel_axis import MessageBytes, ParallelAxis

# A block gathers its stream ahead of attention and of feed-forward, and shares out the sums after
# each. The backward pass does the reverse of all four.
EXCHANGES_A_BLOCK, EXCHANGES_OF_ENDS = 8, 4


class TensorAxis(ParallelAxis):
    """The axis whose ranks hold parts of each layer, and compute the same sequences together."""

    name: ClassVar[str] = "tensor"
    cuts_weights: ClassVar[bool] = True
    repeats_loss: ClassVar[bool] = True

    def shares(self, model: ModelSpec, batch: int) -> str:
        heads = max(model.cut_units.values(), default=0)
        return f"{heads} heads" if heads else "layers"

    def fault(self, size: int, model: ModelSpec, batch: int) -> str:
        if size == 1:
            return ""
        if model.uncut_reason:
            return f"parallel.tensor = {size} cannot cut this model: {model.uncut_reason}"
        if not isinstance(model, BlockSettings):
            return (
                f"parallel.tensor = {size} cannot cut this model: only architectures that derive "
                f"from BlockSettings are cut, and {model.architecture} does not"
            )
        heads = max(model.cut_units.values())
        if heads % size:
            legal = [n for n in range(1, heads + 1) if heads % n == 0]
            nearest = min(legal, key=lambda n: (abs(n - size), n))
            return (
                f"{heads} heads cannot be shared by parallel.tensor = {size} ranks: each takes "
                f"equally many; the nearest legal value is {nearest}"
            )
        # A data set may give the vocabulary later: 0 until then.
        if 0 < model.vocab_size < size:
            return (
                f"a vocabulary of {model.vocab_size} cannot be shared by parallel.tensor = {size} "
                "ranks: each takes a token or more"
            )
        return ""

    def traffic_bytes(
        self,
        sizes: Mapping[str, int],
        model: ModelSpec,
        batch: int,
        chunks: int,
        element: MessageBytes,
    ) -> float:
        """Count the stream's all-gathers and reduce-scatters, the mean over the ranks.

        A recomputed layer adds those of its forward pass. A few numbers a token of the loss, and
        the gradients of weights that are not cut, are left out.
        """
        tensor = sizes.get(self.name, 1)
        # The ranks of the context axis have their own positions.
        sharing = ("data", "island", "context")
        rows = batch / math.prod(sizes.get(axis, 1) for axis in sharing)
        stream = element.stream * rows * model.stream_features
        exchanges = EXCHANGES_A_BLOCK * model.blocks + EXCHANGES_OF_ENDS
        return exchanges / sizes.get("pipeline", 1) * stream * (tensor - 1) / tensor
