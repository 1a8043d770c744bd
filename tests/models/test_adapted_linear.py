"""An adapted layer computes what its merged weight computes."""

from typing import Literal

import pytest
import torch
from torch import nn

from mpillm.models.layers.adapted_linear import AdaptedLinear, Adapter, adapted_lengths, merged
from mpillm.models.layers.quantized import StoredWeight
from mpillm.models.tuning import AdapterSettings


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("stores", [False, True])
def test_the_layer_is_the_merged_one(method: Literal["lora", "dora"], stores: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(70, 12).requires_grad_(False)
    adapter = Adapter(linear, AdapterSettings(method=method, rank=3))
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.uniform_(0.1, 1.0)
    stored = StoredWeight((12, 70), "int8") if stores else None
    weight_OI = linear.weight.detach()
    if stored is not None:
        stored.fill(weight_OI)
        weight_OI = stored.decoded()
    layer, x = AdaptedLinear(linear, adapter, stored), torch.randn(2, 5, 70)
    factors = adapter.a.detach(), adapter.b.detach()
    magnitude = None if adapter.magnitude is None else adapter.magnitude.detach()
    whole_OI = merged(weight_OI, *factors, adapter.scale, magnitude)
    expected = nn.functional.linear(x, whole_OI, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    layer(x).sum().backward()
    assert linear.weight.grad is None
    assert all(weight.grad is not None for weight in adapter.parameters())


def test_lengths_are_those_of_the_sum() -> None:
    torch.manual_seed(4)
    weight_OI, a_RI, b_OR = torch.randn(9, 30), torch.randn(2, 30), torch.randn(9, 2)
    expected = (weight_OI + 1.5 * b_OR @ a_RI).norm(dim=1)
    torch.testing.assert_close(adapted_lengths(weight_OI, a_RI, b_OR, 1.5), expected)


def test_a_row_of_zeros_stays_one() -> None:
    weight_OI = torch.ones(3, 4)
    weight_OI[1] = 0
    whole_OI = merged(weight_OI, torch.zeros(2, 4), torch.zeros(3, 2), 1.0, weight_OI.norm(dim=1))
    torch.testing.assert_close(whole_OI, weight_OI)
