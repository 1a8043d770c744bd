"""Lion: the sign of an average of gradients (Chen et al. 2023, algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mpillm.train.optimizers.adamw import Beta
from mpillm.train.optimizers.optimizer import Decay, OptimizerSettings, Rate

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class LionSettings(OptimizerSettings):
    """The settings of Lion. Each element moves by the rate, so the rate is a tenth to a third of
    AdamW's, and the decay three to ten times as large (section 5 of the paper).
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    state_bytes_per_parameter: ClassVar[int] = 4  # one average in float32

    name: str = "lion"
    learning_rate: Rate = 1e-4
    beta1: Beta = 0.9
    """The weight of the average in the sign of an update."""
    beta2: Beta = 0.99
    """The weight of the average in the next one."""
    weight_decay: Decay = 1.0

    def build(self, weights: "Mapping[str, nn.Parameter]") -> "Optimizer":
        from mpillm.train.optimizers.torch_optimizer import GroupOptimizer, allocate_state

        optimizer = GroupOptimizer(self.parameter_groups(weights, self.weight_decay), self.update)
        allocate_state(optimizer, self, weights)
        return optimizer

    def update(
        self,
        group: dict[str, Any],
        weights: "list[Tensor]",
        gradients: "list[Tensor]",
        states: list[dict[str, Any]],
    ) -> None:
        """Update a run of weights and their averages in place."""
        import torch

        averages = [state["exp_avg"] for state in states]
        signs = torch._foreach_lerp(averages, gradients, 1 - self.beta1)
        torch._foreach_sign_(signs)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-group["lr"])
        torch._foreach_lerp_(averages, gradients, 1 - self.beta2)

    def describe(self) -> str:
        return f"Lion, {self.describe_rate()}, decay {self.weight_decay:g}"
