"""AWQ: scale inputs whose activations are large, so that their weights are rounded less.

Lin et al. 2023, "AWQ". The factors are powers of the inputs' root mean squares; of a grid of
exponents, the one with the least error of the outputs is taken, then each group's cut of its range.
Shapes: O outputs, I inputs.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.models.layers.stored.stored_codes import Grid, StoredCodes, StoredFormat, best_grid

# Section 3.2 of the paper: an interval of [0, 1].
EXPONENTS = 20


class Awq(CompressionMethod):
    """int4 in groups."""

    name: ClassVar[str] = "awq-int4"
    needs_data: ClassVar[bool] = True
    needs_products: ClassVar[bool] = True

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(4, self.options.group)

    def smooth(self, weights: Sequence[Tensor], inputs: InputStatistics) -> Tensor | None:
        size_I = (inputs.squares_I / max(1, inputs.count)).sqrt().clamp_min(1e-4).float()
        best, chosen = self._error(weights, inputs, torch.ones_like(size_I)), None
        for step in range(1, EXPONENTS + 1):
            factor_I = size_I ** (step / EXPONENTS)
            # Their size has no effect: around 1 nothing overflows.
            factor_I = factor_I / (factor_I.max() * factor_I.min()).sqrt()
            error = self._error(weights, inputs, factor_I)
            if error < best:
                best, chosen = error, factor_I
        return chosen

    def _error(self, weights: Sequence[Tensor], inputs: InputStatistics, factor_I: Tensor) -> float:
        """Return the squared error of the layers' outputs, when weights are scaled by factors."""
        assert inputs.products_II is not None
        products_II, total = inputs.products_II.float(), 0.0
        for weight_OI in weights:
            scaled_OI = weight_OI.float() * factor_I
            wrong_OI = Grid.of(scaled_OI, self.format).rounded(scaled_OI) / factor_I - weight_OI
            total += float(((wrong_OI @ products_II) * wrong_OI).sum())
        return total

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> StoredCodes:
        assert inputs is not None
        grid = best_grid(weight_OI, self.format, inputs.squares_I.clamp_min(1e-12).float())
        return grid.store(grid.codes(weight_OI))
