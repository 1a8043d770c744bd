"""AdamW, and its state as named tensors."""

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mpillm.train.lr_schedule import OptimizerSettings

SLOTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's, without its compiler, which it would load only to keep it away: that takes as long as torch itself."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(
    weights: Iterable[nn.Parameter], settings: OptimizerSettings
) -> torch.optim.AdamW:
    """AdamW over `weights`, fused, with its state allocated."""
    weights = list(weights)
    matrices = [weight for weight in weights if weight.dim() > 1]
    vectors = [weight for weight in weights if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    for weight in weights:
        optimizer.state[weight] = {
            "step": torch.zeros(()),
            **{slot: torch.zeros_like(weight) for slot in SLOTS},
        }
    return optimizer


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """How many steps were taken: AdamW corrects its averages by it."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def optimizer_tensors(
    weights: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    """The checkpoint's names of the optimizer's averages of `weights`: `optimizer/exp_avg/layers/0/…`."""
    return {
        f"optimizer/{slot}/{name.replace('.', '/')}": optimizer.state[weight][slot]
        for slot in SLOTS
        for name, weight in weights.items()
    }
