"""Magnitude, Wanda and SparseGPT: exact shares and patterns, and the errors of the outputs."""

import pytest
import torch

from mpillm.errors import UsageError
from mpillm.infer.compress.compression_method import CompressionMethod, CompressionOptions
from mpillm.infer.compress.magnitude import Magnitude, smallest_of_each
from mpillm.infer.compress.sparse_gpt import SparseGpt
from mpillm.infer.compress.wanda import Wanda
from tests.infer.compress.layer_problems import output_error, problem, statistics

METHODS: list[type[CompressionMethod]] = [Magnitude, Wanda, SparseGpt]


@pytest.mark.parametrize("kind", METHODS)
def test_the_share_of_zeros_is_exact(kind: type[CompressionMethod]) -> None:
    weight_OI, x_NI = problem(24, 160)
    found = kind(CompressionOptions(sparsity=0.25)).solve(weight_OI, statistics(x_NI))
    assert isinstance(found, torch.Tensor)
    assert int((found == 0).sum()) == 24 * 160 // 4


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_pattern_holds_in_each_group(kind: type[CompressionMethod], pattern: str) -> None:
    weight_OI, x_NI = problem(24, 160)
    found = kind(CompressionOptions(pattern=pattern)).solve(weight_OI, statistics(x_NI))
    assert isinstance(found, torch.Tensor)
    zeros, every = map(int, pattern.split(":"))
    counts = (found.view(24, -1, every) == 0).sum(-1)
    assert (counts == zeros).all()


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_methods_that_read_inputs_have_smaller_errors(pattern: str) -> None:
    weight_OI, x_NI = problem()
    options = CompressionOptions(pattern=pattern)
    errors = []
    for kind in METHODS:
        found = kind(options).solve(weight_OI, statistics(x_NI))
        assert isinstance(found, torch.Tensor)
        errors.append(output_error(found, weight_OI, x_NI))
    assert errors[2] < 0.9 * errors[1]
    assert errors[1] < 0.5 * errors[0]


def test_kept_weights_are_those_of_the_model_but_for_sparsegpt() -> None:
    weight_OI, x_NI = problem()
    for kind in METHODS[:2]:
        found = kind(CompressionOptions()).solve(weight_OI, statistics(x_NI))
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found[found != 0], weight_OI[found != 0])


def test_of_equal_scores_exactly_so_many_are_removed() -> None:
    removed = smallest_of_each(torch.ones(3, 8), 2, 4)
    assert removed.view(3, 2, 4).sum(-1).eq(2).all()


def test_a_pattern_that_does_not_divide_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="which --pattern 2:5 does not divide"):
        Wanda(CompressionOptions(pattern="2:5")).check_layer("layers.0.x", (8, 64))
