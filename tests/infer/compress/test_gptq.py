"""GPTQ next to rounding to nearest, to a slow reference, and to other numbers of ranks."""

import torch
from mpi4py import MPI

from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.gptq import DAMPING, Gptq4, Gptq8, solve_columns
from mpillm.infer.compress.round_to_nearest import RoundToNearest4
from mpillm.models.layers.stored.stored_codes import Grid, StoredFormat
from tests.infer.compress.layer_problems import output_error, problem, statistics

BY_32 = CompressionOptions(group=32)


def test_the_error_of_the_outputs_is_less_than_half_of_rounding_to_nearest() -> None:
    weight_OI, x_NI = problem()
    found = Gptq4(BY_32).solve(weight_OI, statistics(x_NI)).decoded()
    nearest = RoundToNearest4(BY_32).solve(weight_OI, None).decoded()
    assert output_error(found, weight_OI, x_NI) < 0.5 * output_error(nearest, weight_OI, x_NI)
    eight = Gptq8(BY_32).solve(weight_OI, statistics(x_NI)).decoded()
    assert output_error(eight, weight_OI, x_NI) < 0.05 * output_error(found, weight_OI, x_NI)


def test_codes_are_those_of_the_plain_algorithm() -> None:
    """Optimal brain quantisation of one column at a time, with the inverse computed anew."""
    weight_OI, x_NI = problem(6, 32)
    products_II = statistics(x_NI).products_II
    grid = Grid.of(weight_OI, StoredFormat(4, 32))
    found_OI = solve_columns(weight_OI, products_II, grid)
    damped_II = products_II.clone()
    damped_II.diagonal().add_(DAMPING * products_II.diagonal().mean())
    left_OI, expected_OI = weight_OI.double().clone(), torch.empty(6, 32)
    columns = products_II.diagonal().argsort(descending=True, stable=True).tolist()
    for place, column in enumerate(columns):
        rest = columns[place:]
        inverse = torch.linalg.inv(damped_II[rest][:, rest])
        code_O = grid.codes(left_OI)[:, column]
        expected_OI[:, column] = code_O
        value_O = (code_O - grid.zero_OG[:, 0]) * grid.scale_OG[:, 0]
        wrong_O = (left_OI[:, column] - value_O) / inverse[0, 0]
        left_OI[:, rest] -= wrong_O[:, None] * inverse[0]
    assert (found_OI == expected_OI).float().mean() > 0.99


def test_dead_inputs_and_no_inputs_at_all_are_rounded_to_nearest() -> None:
    weight_OI, x_NI = problem()
    x_NI[:, 5] = 0
    assert Gptq4(BY_32).solve(weight_OI, statistics(x_NI)).decoded().isfinite().all()
    found = Gptq4(BY_32).solve(weight_OI, statistics(x_NI[:0])).decoded()
    nearest = RoundToNearest4(BY_32).solve(weight_OI, None).decoded()
    assert (found - weight_OI).square().sum() <= (nearest - weight_OI).square().sum() * 1.01


def test_sums_over_ranks_are_those_of_one(comm: MPI.Intracomm) -> None:
    weight_OI, x_NI = problem()
    parts = x_NI.split(50)
    own = statistics(x_NI[:0])
    for part in parts[comm.rank :: comm.size]:
        own.add(part)
    whole = statistics(x_NI[:0])
    for part in parts:
        whole.add(part)
    owner = comm.size - 1
    own.reduce(owner, comm)
    if comm.rank == owner:
        torch.testing.assert_close(own.products_II, whole.products_II, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(own.squares_I, whole.squares_I, rtol=1e-12, atol=1e-9)
        assert torch.equal(own.largest_I, whole.largest_I)
        assert own.count == whole.count == 400
        codes = [Gptq4(BY_32).solve(weight_OI, each).plain_codes for each in (own, whole)]
        assert (codes[0] == codes[1]).float().mean() >= 0.999
