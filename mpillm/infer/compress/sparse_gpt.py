"""SparseGPT: remove weights column by column; those to come make up for the error.

Frantar and Alistarh 2023, "SparseGPT". Shapes: O outputs, I inputs, b columns of a block.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.gptq import BLOCK, inverse_factor
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.infer.compress.magnitude import smallest_of_each


class SparseGpt(CompressionMethod):
    """A share of each block of columns, or N in each M weights of a row."""

    name: ClassVar[str] = "sparsegpt"
    needs_data: ClassVar[bool] = True
    needs_products: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> Tensor:
        assert inputs is not None
        assert inputs.products_II is not None
        factor_II = inverse_factor(inputs.products_II).float()
        left_OI = weight_OI.float().clone()
        zeros, every = self.options.zeros_of()
        # A block has whole patterns.
        width = BLOCK if not every else BLOCK // every * every
        for first in range(0, left_OI.shape[1], width):
            last = min(first + width, left_OI.shape[1])
            inside_bb = factor_II[first:last, first:last]
            removed_Ob = None
            if not every:
                score_Ob = (left_OI[:, first:last] / inside_bb.diagonal()).square()
                count = round(self.options.sparsity * score_Ob.numel())
                removed_Ob = smallest_of_each(score_Ob.reshape(1, -1), count, 0).view_as(score_Ob)
            error_Ob = _prune_block(left_OI[:, first:last], inside_bb, removed_Ob, zeros, every)
            left_OI[:, last:].addmm_(error_Ob, factor_II[first:last, last:], alpha=-1)
        return left_OI


def _prune_block(
    left_Ob: Tensor, factor_bb: Tensor, removed_Ob: Tensor | None, zeros: int, every: int
) -> Tensor:
    """Prune columns in place; return the error (O, b) that later blocks make up for.

    `removed_Ob`: None: `zeros` in each `every` weights, chosen where each pattern begins.
    """
    error_Ob = torch.empty_like(left_Ob)
    chosen_Ob = torch.zeros_like(left_Ob, dtype=torch.bool) if removed_Ob is None else removed_Ob
    for column in range(left_Ob.shape[1]):
        if removed_Ob is None and column % every == 0:
            pattern = slice(column, column + every)
            score_OM = (left_Ob[:, pattern] / factor_bb.diagonal()[pattern]).square()
            chosen_Ob[:, pattern] = smallest_of_each(score_OM, zeros, every)
        kept_O = left_Ob[:, column].masked_fill(chosen_Ob[:, column], 0.0)
        error_O = (left_Ob[:, column] - kept_O) / factor_bb[column, column]
        left_Ob[:, column:].addr_(error_O, factor_bb[column, column:], alpha=-1)
        left_Ob[:, column] = kept_O
        error_Ob[:, column] = error_O
    return error_Ob
