"""Muon: momentum, orthogonalised, for the matrices inside the blocks; AdamW for all other weights.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), Newton–Schulz with five steps; Liu
et al. 2025 (arXiv 2502.16982), decay, and the scale that gives an update AdamW's size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le

from mpillm.errors import RecipeError
from mpillm.models.spec import ModelSpec, Part
from mpillm.train.optimizers.adamw import AdamWSettings, Beta
from mpillm.train.optimizers.optimizer import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

# The quintic's coefficients of Jordan et al.: the steepest at 0 that keeps singular values near 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
# The root mean square of AdamW's updates (Liu et al., section 2.2).
ADAMW_SIZE = 0.2
LEAST_NORM = 1e-7


@dataclass(frozen=True)
class MuonSettings(AdamWSettings):
    """The settings of Muon, and of AdamW for embeddings, head and vectors: one rate for both.

    It needs whole matrices, as Newton–Schulz multiplies a matrix by itself. A cut one is refused.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer", *AdamWSettings.slots)
    state_bytes_per_parameter: ClassVar[int] = 4  # of a matrix inside the blocks
    elementwise: ClassVar[bool] = False

    name: str = "muon"
    momentum: Beta = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Ge(1), Le(20)] = 5

    @classmethod
    def needs_whole(cls, name: str, shape: Shape) -> bool:
        return is_inner_matrix(name, shape)

    @classmethod
    def slot_shapes(cls, name: str, shape: Shape) -> Mapping[str, Shape]:
        if is_inner_matrix(name, shape):
            return {"momentum_buffer": shape}
        return dict.fromkeys(AdamWSettings.slots, shape)

    def state_bytes(self, model: ModelSpec, part: Part) -> int:
        # A part without blocks is an end of the model: embeddings or head, which have two averages.
        ends = [Part(0, 0)] * model.begins(part) + [Part(model.blocks, model.blocks)] * model.ends(
            part
        )
        more = AdamWSettings.state_bytes_per_parameter - self.state_bytes_per_parameter
        total = model.parameters_of(part)
        outside = min(total, sum(map(model.parameters_of, ends)))
        return self.state_bytes_per_parameter * total + more * outside

    def build(self, weights: "Mapping[str, nn.Parameter]") -> "Optimizer":
        from mpillm.train.optimizers.torch_optimizer import GroupOptimizer, allocate_state

        inner = {n: w for n, w in weights.items() if is_inner_matrix(n, tuple(w.shape))}
        outer = {name: weight for name, weight in weights.items() if name not in inner}
        if not inner:
            raise RecipeError(
                "optimizer.name = muon updates matrices inside the blocks, whose names hold the "
                f"block's number, and this model has none ({', '.join(list(weights)[:3])}, …); "
                "take adamw"
            )
        others = super().build(outer) if outer else None
        groups = self.parameter_groups(inner, self.weight_decay)
        optimizer = GroupOptimizer(groups, self.update, others)
        allocate_state(optimizer, self, inner)
        return optimizer

    def update(
        self,
        group: dict[str, Any],
        weights: "list[Tensor]",
        gradients: "list[Tensor]",
        states: list[dict[str, Any]],
    ) -> None:
        """Update a run of matrices and their momenta in place."""
        import torch

        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        ahead: Sequence[Tensor] = momenta
        if self.nesterov:
            ahead = torch._foreach_lerp(gradients, momenta, self.momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for weight, matrix in zip(weights, ahead, strict=True):
            # bfloat16 as the source has it. CPUs multiply it fast only where they have AMX.
            dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
            # One matrix at a time: the bits must not depend on how many a rank holds.
            update = orthogonalised(matrix, self.newton_schulz_steps, dtype)
            weight.add_(update, alpha=-group["lr"] * ADAMW_SIZE * max(matrix.shape) ** 0.5)

    def describe(self) -> str:
        return f"Muon, {self.describe_rate()}, decay {self.weight_decay:g}; AdamW for the rest"


def is_inner_matrix(name: str, shape: Shape) -> bool:
    """Return whether a weight is a matrix inside the blocks.

    The name of such a weight holds the number of its block: `layers.0.attention.query.weight`.
    """
    return len(shape) == 2 and any(part.isdecimal() for part in name.split("."))


def orthogonalised(matrix_NM: "Tensor", steps: int, dtype: "torch.dtype") -> "Tensor":
    """Bring the singular values of a matrix near 1 by `steps` of Newton–Schulz in `dtype`."""
    import torch

    a, b, c = QUINTIC
    # The norm in float32, and as a tensor: nothing waits for a GPU.
    x: Tensor = (matrix_NM / matrix_NM.norm().clamp_(min=LEAST_NORM)).to(dtype)
    # The smaller of the two Gram matrices.
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
