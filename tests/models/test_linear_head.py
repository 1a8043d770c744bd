import pytest
import torch
from torch import nn

from mpillm.models.linear_head import LinearHead, plain_outputs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_the_logits_are_those_of_the_linear_layer(bias: bool, lower: bool) -> None:
    linear, hidden_BTC = nn.Linear(8, 20, bias=bias), torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        expected, head = linear(hidden_BTC), LinearHead.of(hidden_BTC, linear)
    # Outside of autocast, too.
    assert head.hidden_BTC.dtype == expected.dtype
    assert torch.equal(head.logits(), expected)
    assert head.weight_VC is linear.weight


def test_a_soft_cap_bounds_the_logits() -> None:
    hidden_BTC, weight_VC = torch.randn(2, 3, 8), torch.randn(20, 8)
    plain, capped = (LinearHead(hidden_BTC, weight_VC, None, cap).logits() for cap in (0.0, 2.0))
    torch.testing.assert_close(capped, 2 * torch.tanh(plain / 2))
    assert capped.abs().max() < 2 < plain.abs().max()


def test_plain_outputs_are_tensors() -> None:
    head, other = LinearHead(torch.randn(2, 3, 8), torch.randn(20, 8)), torch.randn(2)
    logits, same = plain_outputs((head, other))
    assert logits.shape == (2, 3, 20)
    assert same is other
