"""AWQ: large inputs get finer weights, and the scaled model computes the same."""

import torch

from mpillm.infer.compress.awq import Awq
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.round_to_nearest import RoundToNearest4
from tests.infer.compress.layer_problems import output_error, problem, statistics

BY_32 = CompressionOptions(group=32)


def test_scaled_weights_have_a_smaller_error_of_the_outputs() -> None:
    weight_OI, x_NI = problem()
    method, inputs = Awq(BY_32), statistics(x_NI)
    factor_I = method.smooth([weight_OI], inputs)
    assert factor_I is not None
    # The large inputs are scaled most.
    assert factor_I[::16].min() > factor_I.view(4, 16)[:, 1:].max()
    stored = method.solve(weight_OI * factor_I, inputs.divided(factor_I))
    found = stored.decoded() / factor_I
    nearest = RoundToNearest4(BY_32).solve(weight_OI, None).decoded()
    assert output_error(found, weight_OI, x_NI) < 0.6 * output_error(nearest, weight_OI, x_NI)


def test_inputs_of_one_size_need_no_factors() -> None:
    weight_OI, _ = problem()
    # Products that are those of independent inputs: only the weights' own ranges matter.
    x_NI = torch.eye(64).repeat(4, 1)
    assert Awq(BY_32).smooth([weight_OI], statistics(x_NI)) is None
