"""A toy optimizer: SGD with momentum, written out."""

from dataclasses import dataclass
from typing import ClassVar

from mpillm.train.optimizers.optimizer import OptimizerSettings


@dataclass(frozen=True)
class MomentumSettings(OptimizerSettings):
    slots: ClassVar[tuple[str, ...]] = ("velocity",)
    state_bytes_per_parameter: ClassVar[int] = 4

    name: str = "growth.toy_optimizer:MomentumSettings"
    momentum: float = 0.9

    def build(self, weights):
        import torch

        class Momentum(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure=None) -> None:
                for group in self.param_groups:
                    for weight in group["params"]:
                        velocity = self.state[weight]["velocity"]
                        velocity.mul_(group["momentum"]).add_(weight.grad)
                        weight.sub_(group["lr"] * velocity)

        groups = self.parameter_groups(weights)
        optimizer = Momentum(groups, {"momentum": self.momentum})
        for weight in weights.values():
            optimizer.state[weight]["velocity"] = torch.zeros_like(weight)
        return optimizer

    def describe(self) -> str:
        return f"SGD with momentum {self.momentum:g}, rate {self.learning_rate:g}"
