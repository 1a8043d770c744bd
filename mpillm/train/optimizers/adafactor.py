"""Adafactor: the second moment of a matrix as the product of its rows' and its columns' means.

Source: Shazeer & Stern 2018, algorithms 4 and 5, without momentum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from mpillm.train.optimizers.optimizer import Decay, OptimizerSettings, Rate, Shape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class AdafactorSettings(OptimizerSettings):
    """The settings of Adafactor. A weight moves by the rate times its own root mean square.

    The rate is the schedule's alone: the paper's cap of 1/√t is left out, as it is a schedule of
    its own. It needs whole weights: means over rows and columns, and norms, go over all of one.
    """

    slots: ClassVar[tuple[str, ...]] = ("row_var", "col_var", "variance")
    state_bytes_per_parameter: ClassVar[int] = 0  # of n × m elements n + m have a number of state
    elementwise: ClassVar[bool] = False

    name: str = "adafactor"
    learning_rate: Rate = 1e-2
    beta2_exponent: Annotated[float, Gt(0), Le(1)] = 0.8
    """The second moments of step t keep 1 − t^−beta2_exponent of those before."""
    epsilon1: Annotated[float, Gt(0)] = 1e-30
    """What is added to each squared gradient."""
    epsilon2: Annotated[float, Gt(0)] = 1e-3
    """The least root mean square of a weight that scales its update."""
    threshold: Annotated[float, Ge(1)] = 1.0
    """The largest root mean square of an update before it is scaled."""
    weight_decay: Decay = 0.0

    @classmethod
    def slot_shapes(cls, name: str, shape: Shape) -> Mapping[str, Shape]:
        """Return the shapes: of a matrix (n, m) n rows and m columns, of a vector all elements.

        The last two dims are factored; torch's own class has the same names and shapes.
        """
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

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
        """Update a run of weights and their second moments in place."""
        import torch

        new = float(group["steps"] ** -self.beta2_exponent)
        updates = [self._scaled(*pair, new) for pair in zip(gradients, states, strict=True)]
        roots = [weight.numel() ** 0.5 for weight in weights]
        # Root mean squares as tensors of no dims: nothing waits for a GPU.
        sizes = torch._foreach_norm(updates)
        torch._foreach_div_(sizes, [root * self.threshold for root in roots])
        torch._foreach_clamp_min_(sizes, 1.0)
        factors = torch._foreach_norm(weights)
        torch._foreach_div_(factors, roots)
        torch._foreach_clamp_min_(factors, self.epsilon2)
        torch._foreach_div_(factors, sizes)
        torch._foreach_mul_(factors, group["lr"])
        torch._foreach_mul_(updates, factors)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, updates)

    def _scaled(self, gradient: "Tensor", state: dict[str, Any], new: float) -> "Tensor":
        """Update the second moments by the share `new`; return the gradient over their root."""
        import torch

        if gradient.dim() < 2:
            variance: Tensor = state["variance"]
            variance.lerp_(gradient.square().add_(self.epsilon1), new)
            return gradient * variance.rsqrt()
        square = gradient.square()
        for slot, dim in (("row_var", -1), ("col_var", -2)):
            state[slot].lerp_(square.mean(dim, keepdim=True).add_(self.epsilon1), new)
        rows: Tensor = state["row_var"]
        columns: Tensor = state["col_var"]
        # Each factor has its own root: their product may be less than float32 holds.
        update = torch.mul(gradient, (rows / rows.mean(-2, keepdim=True)).rsqrt_(), out=square)
        return update.mul_(columns.rsqrt())

    def describe(self) -> str:
        return f"Adafactor, {self.describe_rate()}, decay {self.weight_decay:g}"
