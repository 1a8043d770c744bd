"""AdamW (Loshchilov & Hutter 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from mpillm.train.optimizers.optimizer import Decay, OptimizerSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

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
    weight_decay: Decay = 0.1

    def build(self, weights: "Mapping[str, nn.Parameter]") -> "Optimizer":
        import torch

        from mpillm.train.optimizers.torch_optimizer import allocate_state, light

        optimizer = light(torch.optim.AdamW)(
            self.parameter_groups(weights, self.weight_decay),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )
        for weight in weights.values():
            # On the weight's device: torch's fused AdamW expects the step count there.
            optimizer.state[weight]["step"] = torch.zeros((), device=weight.device)
        allocate_state(optimizer, self, weights)
        return optimizer

    def describe(self) -> str:
        return f"AdamW, {self.describe_rate()}, decay {self.weight_decay:g}"
