import pytest
import torch

from mpillm.errors import RecipeError
from mpillm.train.optimizers.sgd import SGDSettings
from tests.train.optimizers.paths import (
    check_close,
    gradients,
    new_weights,
    optimized,
    rates,
    referred,
)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_it_is_the_textbook_s(momentum: float, nesterov: bool) -> None:
    def update(name, weight, gradient, state, step, rate, decay):  # type: ignore[no-untyped-def]
        gradient = gradient + decay * weight
        velocity = state.setdefault("velocity", torch.zeros_like(weight))
        velocity.copy_(momentum * velocity + gradient)
        weight -= rate * (gradient + momentum * velocity if nesterov else velocity)

    settings = SGDSettings(momentum=momentum, nesterov=nesterov, weight_decay=0.3)
    check_close(optimized(settings), referred(update, 0.3))


def test_it_is_torch_s_without_the_buffer_of_zeros() -> None:
    weights = new_weights()
    plain = torch.optim.SGD(weights.values(), momentum=0.9, nesterov=True)
    for rate, found in zip(rates(), gradients(), strict=True):
        for name, weight in weights.items():
            weight.grad = found[name].clone()
        plain.param_groups[0]["lr"] = rate
        plain.step()
    expected = {name: weight.detach() for name, weight in weights.items()}
    check_close(optimized(SGDSettings(nesterov=True)), expected)


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(RecipeError, match=r"nesterov = true needs a momentum.*such as 0\.9"):
        SGDSettings(nesterov=True, momentum=0.0)
