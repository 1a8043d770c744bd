"""SmoothQuant: inputs with a few large features are rounded with less error."""

import torch

from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.smooth_quant import SmoothQuant
from mpillm.models.layers.stored.stored_kernels import rounded_rows
from tests.infer.compress.layer_problems import problem, statistics


def error(weight_OI: torch.Tensor, x_NI: torch.Tensor, method: SmoothQuant) -> float:
    codes_NI, scale_N1 = rounded_rows(x_NI)
    made = (codes_NI * scale_N1) @ method.solve(weight_OI, None).decoded().t()
    return float((made - x_NI @ weight_OI.t()).square().sum())


def test_moved_ranges_make_the_error_of_rounded_inputs_smaller() -> None:
    weight_OI, x_NI = problem()
    method = SmoothQuant(CompressionOptions())
    factor_I = method.smooth([weight_OI, weight_OI[:3]], statistics(x_NI, products=False))
    assert factor_I is not None
    smooth = error(weight_OI * factor_I, x_NI / factor_I, method)
    assert smooth < 0.5 * error(weight_OI, x_NI, method)


def test_dead_inputs_have_finite_factors() -> None:
    weight_OI, x_NI = problem()
    x_NI[:, 0], weight_OI[:, 1] = 0, 0
    factor_I = SmoothQuant(CompressionOptions()).smooth([weight_OI], statistics(x_NI))
    assert factor_I is not None
    assert factor_I.isfinite().all()
    assert (factor_I > 0).all()
