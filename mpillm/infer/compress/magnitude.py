"""Magnitude pruning: the smallest weights of a layer become 0 (Han et al. 2015).

Shapes: O outputs, I inputs, M weights of a pattern.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.input_statistics import InputStatistics


class Magnitude(CompressionMethod):
    """A share of all weights of each layer, or N in each M of a row."""

    name: ClassVar[str] = "magnitude"
    prunes: ClassVar[bool] = True

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> Tensor:
        zeros, every = self.options.zeros_of()
        size_OI = weight_OI.abs()
        if every:
            removed_OI = smallest_of_each(size_OI, zeros, every)
        else:
            removed_OI = smallest_of_each(
                size_OI.reshape(1, -1), round(self.options.sparsity * size_OI.numel()), 0
            ).view_as(size_OI)
        return weight_OI.masked_fill(removed_OI, 0.0)


def smallest_of_each(score_OI: Tensor, zeros: int, every: int) -> Tensor:
    """Mark the `zeros` smallest scores in each `every` of a row (0: in each row), bool (O, I).

    Exactly so many are marked: of equal scores the first ones.
    """
    groups = score_OI.reshape(-1, every or score_OI.shape[1])
    places = groups.argsort(dim=1, stable=True)[:, :zeros]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True).view_as(score_OI)
