"""Wanda: remove weights by their size times the norm of their input, in each row.

Sun et al. 2023, "A simple and effective pruning approach for large language models". Shapes: O
outputs, I inputs.
"""

from typing import ClassVar

from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.infer.compress.magnitude import smallest_of_each


class Wanda(CompressionMethod):
    """A share of each row, or N in each M of it."""

    name: ClassVar[str] = "wanda"
    needs_data: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> Tensor:
        assert inputs is not None
        score_OI = weight_OI.abs() * inputs.squares_I.sqrt().float()
        zeros, every = self.options.zeros_of()
        count = zeros or round(self.options.sparsity * weight_OI.shape[1])
        return weight_OI.masked_fill(smallest_of_each(score_OI, count, every), 0.0)
