"""The fast RMSNorm, compared with torch's."""

import pytest
import torch
from torch import nn

from mpillm.models.layers.rms_norm import RMSNorm, _RootMeanSquare
from mpillm.parallel.pipeline.split_backward import SplitBackward

EPSILON = 1e-5


def make(shape=(3, 7, 48), dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) * scale for _ in range(2))
    norm = RMSNorm(shape[-1], eps=EPSILON).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    return norm, x.requires_grad_(), grad


def compute(forward, x, weight, grad):
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def test_gradients_are_those_of_finite_differences():
    norm, x, _ = make((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(_RootMeanSquare.apply, (x, norm.weight, EPSILON))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 7, 48), (2, 300, 384)], ids=str)
def test_it_is_torch_s_norm(shape, scale):
    norm, x, grad = make(shape, scale=scale)
    # torch's in float64: in float32 its own error is 2e-5.
    wide = [each.detach().double().requires_grad_() for each in (x, norm.weight)]
    expected = compute(
        lambda given: nn.functional.rms_norm(given, shape[-1:], wide[1], EPSILON),
        *wide,
        grad.double(),
    )
    for one, other in zip(compute(norm, x, norm.weight, grad), expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert float(error) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_take_torch_s_norm(dtype, monkeypatch):
    monkeypatch.setattr(_RootMeanSquare, "apply", None)
    norm, x, grad = make(dtype=dtype)
    found = compute(norm, x, norm.weight, grad)
    expected = compute(lambda given: nn.RMSNorm.forward(norm, given), x, norm.weight, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_two_halves_of_a_backward_pass_give_the_bits_of_one():
    norm, x, grad = make()
    _, *expected = compute(norm, x, norm.weight, grad)
    split = SplitBackward((norm(x),), (x,))
    (found,) = split.input((grad,))
    assert norm.weight.grad is None
    split.weights()
    assert torch.equal(found, expected[0])
    assert torch.equal(norm.weight.grad, expected[1])


def test_its_bits_do_not_depend_on_other_rows():
    norm, x, grad = make()
    y, grad_x, _ = compute(norm, x, norm.weight, grad)
    for row in range(3):
        own = x[row : row + 1].detach().requires_grad_()
        alone = compute(norm, own, norm.weight, grad[row : row + 1])
        assert torch.equal(alone[0][0], y[row])
        torch.testing.assert_close(alone[1][0], grad_x[row], rtol=1e-6, atol=1e-6)
