"""SmoothQuant: move the range of inputs into weights, then round both to int8.

Xiao et al. 2022, "SmoothQuant": an input is divided by max|x|^α / max|w|^(1 − α). Shapes: O
outputs, I inputs.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.infer.compress.round_to_nearest import RoundToNearest8
from mpillm.models.layers.stored.stored_codes import StoredFormat

# Smaller ranges are those of dead inputs.
LEAST = 1e-5


class SmoothQuant(RoundToNearest8):
    """int8 weights a row, and int8 inputs with a scale a token."""

    name: ClassVar[str] = "smoothquant"
    needs_data: ClassVar[bool] = True

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(8, activations=True)

    def smooth(self, weights: Sequence[Tensor], inputs: InputStatistics) -> Tensor | None:
        largest_I = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        inside_I = inputs.largest_I.float().clamp_min(LEAST) ** self.options.alpha
        return (inside_I / largest_I.clamp_min(LEAST) ** (1 - self.options.alpha)).clamp_min(LEAST)
