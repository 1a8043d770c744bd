"""Stored weights: how far they are from their values, and the products of both passes."""

import pytest
import torch

from mpillm.models.layers.quantized import StoredWeight, product, rounded
from mpillm.models.tuning import BASE_BITS, BaseFormat

# Half a step, of the largest value of a row.
STEPS = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}


@pytest.mark.parametrize("kind", STEPS)
def test_values_are_rounded_to_the_nearest(kind: BaseFormat) -> None:
    values_OI = torch.randn(24, 100, generator=torch.Generator().manual_seed(1))
    values_OI[3] = 0
    found_OI = rounded(values_OI, kind)
    largest_O1 = values_OI.abs().amax(1, keepdim=True)
    assert ((found_OI - values_OI).abs() <= STEPS[kind] * largest_O1 * 1.0001).all()
    assert not found_OI[3].any()
    if kind == "int4":
        # A group has its own scale: a large value in another one does not change it.
        values_OI[0, 99] = 1000.0
        assert torch.equal(rounded(values_OI, kind)[0, :64], found_OI[0, :64])


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_product_and_its_gradient_are_those_of_the_decoded_weight(kind: BaseFormat) -> None:
    chance = torch.Generator().manual_seed(2)
    stored = StoredWeight((20, 128), kind)
    stored.fill(torch.randn(20, 128, generator=chance))
    nbytes = sum(tensor.nbytes for tensor in stored.tensors)
    assert nbytes == pytest.approx(20 * 128 * BASE_BITS[kind] / 8, rel=0.2)
    x = torch.randn(3, 5, 128, generator=chance).requires_grad_()
    y = product(x, stored)
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    expected = other @ stored.decoded().t()
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)
