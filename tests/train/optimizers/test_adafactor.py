import pytest
import torch

from mpillm.train.optimizers.adafactor import AdafactorSettings
from mpillm.train.optimizers.optimizer import set_rate
from tests.train.optimizers.paths import (
    SHAPES,
    check_close,
    gradients,
    new_weights,
    optimized,
    rates,
    referred,
)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def update(name, weight, gradient, state, step, rate, decay):  # type: ignore[no-untyped-def]
    """Adafactor as Shazeer & Stern 2018 write it, algorithms 4 and 5, with a given rate."""
    kept = 1 - step**-0.8
    square = gradient**2 + 1e-30
    if weight.dim() > 1:
        rows = state.setdefault("rows", torch.zeros(len(weight), dtype=torch.float64))
        columns = state.setdefault("columns", torch.zeros(weight.shape[1], dtype=torch.float64))
        rows.copy_(kept * rows + (1 - kept) * square.sum(1))
        columns.copy_(kept * columns + (1 - kept) * square.sum(0))
        moment = torch.outer(rows, columns) / rows.sum()
    else:
        moment = state.setdefault("moment", torch.zeros_like(weight))
        moment.copy_(kept * moment + (1 - kept) * square)
    scaled = gradient / moment.sqrt()
    scaled = scaled / max(1.0, rms(scaled) / 1.0)
    step_size = max(1e-3, rms(weight)) * rate
    weight *= 1 - rate * decay
    weight -= step_size * scaled


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_paper_s(decay: float) -> None:
    check_close(optimized(AdafactorSettings(weight_decay=decay)), referred(update, decay))


def test_it_is_torch_s_up_to_the_paper_s_epsilon() -> None:
    """Where no row lacks a gradient: torch's adds no epsilon to the squares."""
    weights = new_weights()
    del weights["embedding.weight"]
    # The threshold of rounding in float32, where torch's default hides gradients below 1e-7.
    plain = torch.optim.Adafactor(weights.values(), eps=(1e-30, 1e-3), weight_decay=0.0)
    for rate, found in zip(rates(), gradients(), strict=True):
        for name, weight in weights.items():
            weight.grad = found[name].clone()
        set_rate(plain, rate)
        plain.step()
    expected = {name: weight.detach() for name, weight in weights.items()}
    found_here = optimized(AdafactorSettings())
    check_close({name: found_here[name] for name in weights}, expected)
    ours = AdafactorSettings().build(new := new_weights())
    for name, theirs in ((n, plain.state[w]) for n, w in weights.items()):
        shapes = {slot: s.shape for slot, s in theirs.items() if slot != "step"}
        assert {slot: s.shape for slot, s in ours.state[new[name]].items()} == shapes


def test_gradients_of_zero_and_of_any_size_give_finite_weights() -> None:
    for scale in (0.0, 1e-25, 1e-12, 1e12):
        weights = new_weights()
        optimizer = AdafactorSettings().build(weights)
        for _ in range(3):
            for weight in weights.values():
                weight.grad = scale * weight.detach().clone()
            optimizer.step()
        assert all(weight.isfinite().all() for weight in weights.values()), scale


def test_state_keeps_a_dim_for_each_dim_of_the_weight() -> None:
    shapes = {n: dict(AdafactorSettings.slot_shapes(n, s)) for n, s in SHAPES.items()}
    assert shapes["embedding.weight"] == {"row_var": (7, 1), "col_var": (1, 5)}
    assert shapes["layers.0.norm.weight"] == {"variance": (5,)}
    assert AdafactorSettings.slot_shapes("x", (3, 4, 5)) == {
        "row_var": (3, 4, 1),
        "col_var": (3, 1, 5),
    }
