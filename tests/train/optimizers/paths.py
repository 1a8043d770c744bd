"""Step an optimizer of ours, and a plain reference in float64, over the same random gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mpillm.train.optimizers.optimizer import OptimizerSettings, set_rate

SHAPES = {
    "embedding.weight": (7, 5),
    "layers.0.tall.weight": (9, 4),
    "layers.0.wide.weight": (4, 6),
    "layers.0.norm.weight": (5,),
    "layers.0.tall.bias": (9,),
}
STEPS = 5
# Updates a weight of float64 in place: (weight, gradient, state, step from 1, rate, decay).
Reference = Callable[[str, Tensor, Tensor, dict[str, Tensor], int, float, float], None]


def new_weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator) / 3)
        for name, shape in SHAPES.items()
    }


def gradients() -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of each step; some rows of the embedding have none."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        found = {n: torch.randn(s, generator=generator) / 50 for n, s in SHAPES.items()}
        found["embedding.weight"][:2] = 0
        yield found


def rates() -> list[float]:
    return [0.02 / (step + 1) for step in range(STEPS)]


def optimized(settings: OptimizerSettings) -> dict[str, Tensor]:
    """Return the weights after STEPS steps of the optimizer."""
    weights = new_weights()
    optimizer = settings.build(weights)
    for rate, found in zip(rates(), gradients(), strict=True):
        for name, weight in weights.items():
            weight.grad = found[name].clone()
        set_rate(optimizer, rate)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def referred(update: Reference, decay: float) -> dict[str, Tensor]:
    """Return the weights after STEPS steps of the reference, with `decay` of matrices."""
    weights = {name: weight.detach().double() for name, weight in new_weights().items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for step, (rate, found) in enumerate(zip(rates(), gradients(), strict=True), 1):
        for name, weight in weights.items():
            own = decay if weight.dim() > 1 else 0.0
            update(name, weight, found[name].double(), states[name], step, rate, own)
    return weights


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name].float(), rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def adamw_reference(name, weight, gradient, state, step, rate, decay):  # type: ignore[no-untyped-def]
    """AdamW as Loshchilov & Hutter 2019 write it, algorithm 2."""
    mean = state.setdefault("mean", torch.zeros_like(weight))
    square = state.setdefault("square", torch.zeros_like(weight))
    mean.copy_(0.9 * mean + 0.1 * gradient)
    square.copy_(0.95 * square + 0.05 * gradient**2)
    unbiased, unbiased_square = mean / (1 - 0.9**step), square / (1 - 0.95**step)
    weight -= rate * (unbiased / (unbiased_square.sqrt() + 1e-8) + decay * weight)
