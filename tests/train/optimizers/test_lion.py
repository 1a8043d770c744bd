import torch

from mpillm.train.optimizers.lion import LionSettings
from tests.train.optimizers.paths import check_close, optimized, referred


def update(name, weight, gradient, state, step, rate, decay):  # type: ignore[no-untyped-def]
    """Lion as Chen et al. 2023 write it, algorithm 2."""
    average = state.setdefault("average", torch.zeros_like(weight))
    direction = (0.9 * average + 0.1 * gradient).sign()
    weight -= rate * (direction + decay * weight)
    average.copy_(0.99 * average + 0.01 * gradient)


def test_it_is_the_paper_s() -> None:
    check_close(optimized(LionSettings(weight_decay=0.3)), referred(update, 0.3))
    check_close(optimized(LionSettings(weight_decay=0.0)), referred(update, 0.0))
