"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov 1983, Sutskever et al. 2013)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mpillm.errors import RecipeError
from mpillm.train.optimizers.adamw import Beta
from mpillm.train.optimizers.optimizer import Decay, OptimizerSettings, Rate

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class SGDSettings(OptimizerSettings):
    """The settings of SGD. Decay is added to the gradient of matrices, as an L2 penalty is."""

    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    state_bytes_per_parameter: ClassVar[int] = 4  # a sum of gradients in float32

    name: str = "sgd"
    learning_rate: Rate = 0.1
    momentum: Beta = 0.9
    """0: none. The buffer stays, so that a run may continue with another value."""
    nesterov: bool = False
    """Take the gradient ahead of the momentum's step."""
    weight_decay: Decay = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise RecipeError(
                "optimizer.nesterov = true needs a momentum, and optimizer.momentum is 0; "
                "set it to a number such as 0.9, or leave nesterov out"
            )

    def build(self, weights: "Mapping[str, nn.Parameter]") -> "Optimizer":
        import torch

        from mpillm.train.optimizers.torch_optimizer import allocate_state, light

        optimizer = light(torch.optim.SGD)(
            self.parameter_groups(weights, self.weight_decay),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,
        )
        # A buffer of zeros is what torch begins with: its first sum is the gradient itself.
        allocate_state(optimizer, self, weights)
        return optimizer

    def describe(self) -> str:
        kind = "Nesterov momentum" if self.nesterov else "momentum"
        return f"SGD, {kind} {self.momentum:g}, {self.describe_rate()}, decay {self.weight_decay:g}"
