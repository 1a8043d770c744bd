"""Weights in oneDNN's order give the products of plain ones."""

import pytest
import torch
from torch import nn

from mpillm.models.decoder import DecoderConfig
from mpillm.models.layers.stored.packed_linear import (
    MOST_HEAD_ROWS,
    PackedHead,
    PackedLinear,
    pack_linears,
    packing_works,
)
from mpillm.models.part_module import create

needs_kernel = pytest.mark.skipif(not packing_works(), reason="needs bfloat16 units and oneDNN")


@needs_kernel
@pytest.mark.parametrize("rows", [1, 3, 17, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(rows: int, bias: bool) -> None:
    layer = nn.Linear(48, 33, bias).bfloat16()
    x = torch.randn(rows, 1, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        found, expected = PackedLinear(layer)(x), layer(x)
        made = PackedHead(layer).product(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert (made is None) == (rows > MOST_HEAD_ROWS)
    if made is not None:
        own = made if layer.bias is None else made + layer.bias
        torch.testing.assert_close(own, expected, rtol=0.02, atol=0.02)


@needs_kernel
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_the_same(tied: bool) -> None:
    spec = DecoderConfig(layers=2, width=32, heads=4, context=16, vocab_size=64, tied=tied)
    model = create(spec, 1).eval().bfloat16()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model(ids)
        pack_linears(model)
        found = model(ids)
    assert isinstance(model.head, PackedHead)
    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)


def test_other_dtypes_stay_as_they_are() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    pack_linears(layer)
    assert type(layer[0]) is nn.Linear
