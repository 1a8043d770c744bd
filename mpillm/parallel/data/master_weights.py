"""Float32 masters of weights of a lower dtype, which the optimizer steps on.

A weight of 8 significant bits would lose every update that is smaller than 1/256 of it. So the
optimizer adds to a float32 master, and the weight is its rounded copy (Micikevicius et al. 2018,
"Mixed precision training", section 3.1).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mpillm.parallel.data.buckets import ALIGNMENT_BYTES

# A master begins on a cache line of its own.
ALIGNMENT = ALIGNMENT_BYTES // 4


class MasterWeights:
    """The masters of `weights`, views into one flat float32 tensor.

    `values`: the float32 values before the weights were rounded. `gradient_of(weight)`: the float32
    gradient of a weight, whose memory stays the same over all steps.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        values: Mapping[nn.Parameter, Tensor],
        gradient_of: Callable[[nn.Parameter], Tensor],
    ) -> None:
        self._weights = list(weights.values())
        device = self._weights[0].device if self._weights else torch.device("cpu")
        sizes = [-(-weight.numel() // ALIGNMENT) * ALIGNMENT for weight in self._weights]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.parameters: dict[str, nn.Parameter] = {}
        """By the weight's name: a Parameter of its shape, with its gradient as `grad`."""
        for (name, weight), room in zip(
            weights.items(), torch.split(self.flat, sizes), strict=True
        ):
            master = nn.Parameter(room[: weight.numel()].view(weight.shape))
            master.data.copy_(values[weight])
            master.grad = gradient_of(weight)
            self.parameters[name] = master

    @torch.no_grad()
    def round(self) -> None:
        """Overwrite each weight by its master, rounded to the weight's dtype."""
        torch._foreach_copy_(
            [weight.data for weight in self._weights],
            [master.data for master in self.parameters.values()],
        )
