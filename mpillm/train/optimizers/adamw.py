"""AdamW (Loshchilov & Hutter 2019)."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from mpillm.train.optimizers.optimizer import OptimizerSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class AdamWSettings(OptimizerSettings):
    """The settings of AdamW. Decay acts on matrices alone, decoupled from the gradient."""

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    state_bytes_per_parameter: ClassVar[int] = 8  # two averages in float32

    name: str = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.1

    def build(self, weights: Iterable["nn.Parameter"]) -> "torch.optim.AdamW":
        import torch

        weights = list(weights)
        # Decay of norms and biases would pull them to 0, not to a simpler function.
        matrices = [weight for weight in weights if weight.dim() > 1]
        vectors = [weight for weight in weights if weight.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = _light_adamw()(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )
        for weight in weights:
            # On the weight's device: torch's fused AdamW reads the step count there. The state is
            # allocated now, so that a checkpoint can be loaded before the first step.
            optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                **{slot: torch.zeros_like(weight) for slot in self.slots},
            }
        return optimizer

    def describe(self) -> str:
        return (
            f"AdamW, rate {self.learning_rate:g}, {self.schedule}, "
            f"warm-up {self.warmup_steps} steps, decay {self.weight_decay:g}"
        )


@cache
def _light_adamw() -> "type[torch.optim.AdamW]":
    """Return torch's AdamW without the wrappers that import torch's compiler.

    That import takes as long as importing torch itself.
    """
    import torch

    class LightAdamW(torch.optim.AdamW):
        add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
        step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    return LightAdamW
