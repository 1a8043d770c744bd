"""GPTQ: round one input after the other; the inputs to come make up for the error.

Frantar et al. 2022, "GPTQ". Inputs with the largest squares come first (`act_order`), with grids
that are chosen ahead of all rounding (`static_groups`). Shapes: O outputs, I inputs.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mpillm.infer.compress.compression_method import CompressionMethod
from mpillm.infer.compress.input_statistics import InputStatistics
from mpillm.models.layers.stored.stored_codes import Grid, StoredCodes, StoredFormat, best_grid

# Of the mean of the diagonal, added to it: section 3.3 of the paper.
DAMPING = 0.01
# Columns whose errors reach the others in one product.
BLOCK = 128


class Gptq4(CompressionMethod):
    """int4 in groups."""

    name: ClassVar[str] = "gptq-int4"
    needs_data: ClassVar[bool] = True
    needs_products: ClassVar[bool] = True

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(4, self.options.group)

    def solve(self, weight_OI: Tensor, inputs: InputStatistics | None) -> StoredCodes:
        assert inputs is not None
        assert inputs.products_II is not None
        # A column that is always 0 has no say in what is cut off.
        share_I = inputs.squares_I.clamp_min(1e-12).float()
        grid = best_grid(weight_OI, self.format, share_I)
        return grid.store(solve_columns(weight_OI, inputs.products_II, grid))


class Gptq8(Gptq4):
    """int8 a row."""

    name: ClassVar[str] = "gptq-int8"

    @property
    def format(self) -> StoredFormat:
        return StoredFormat(8)


def inverse_factor(products_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor (I, I) of the inverse of X · Xᵀ, damped, in float64."""
    damped_II = products_II.clone()
    diagonal_I = damped_II.diagonal()
    # A dead input has no products: any positive number leaves it alone.
    mean = float(diagonal_I.mean()) or 1.0
    diagonal_I.add_(DAMPING * mean)
    whole_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    found: Tensor = torch.linalg.cholesky(whole_II, upper=True)
    return found


def solve_columns(weight_OI: Tensor, products_II: Tensor, grid: Grid) -> Tensor:
    """Return the codes (O, I), one an element, that make the error of the outputs small."""
    order_I = products_II.diagonal().argsort(descending=True, stable=True)
    factor_II = inverse_factor(products_II[order_I][:, order_I]).float()
    left_OI = weight_OI.float()[:, order_I].clone()
    codes_OI = torch.empty_like(left_OI)
    groups = grid.scale_OG.shape[1]
    group_I = order_I // (weight_OI.shape[1] // groups)
    scale_OI, zero_OI = grid.scale_OG[:, group_I], grid.zero_OG[:, group_I]
    low, high = grid.format.smallest, grid.format.largest
    for first in range(0, len(order_I), BLOCK):
        last = min(first + BLOCK, len(order_I))
        error_Ob = torch.empty(len(left_OI), last - first)
        for column in range(first, last):
            scale_O, zero_O = scale_OI[:, column], zero_OI[:, column]
            code_O = (left_OI[:, column] / scale_O + zero_O).round_().clamp_(low, high)
            codes_OI[:, column] = code_O
            wrong_O = left_OI[:, column] - (code_O - zero_O) * scale_O
            error_O = wrong_O / factor_II[column, column]
            rest = slice(column, last)
            left_OI[:, rest].addr_(error_O, factor_II[column, rest], alpha=-1)
            error_Ob[:, column - first] = error_O
        left_OI[:, last:].addmm_(error_Ob, factor_II[first:last, last:], alpha=-1)
    return codes_OI[:, order_I.argsort()]
