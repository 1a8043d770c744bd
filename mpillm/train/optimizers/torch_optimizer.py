"""torch's side of the optimizers: light versions of its classes, state, and the base of our own.

No step synchronises the host with a GPU: numbers that the host needs are Python's own, all others
stay tensors.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mpillm.train.optimizers.optimizer import OptimizerSettings

Group = dict[str, Any]
State = dict[str, Any]
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)
Update = Callable[[Group, list[Tensor], list[Tensor], list[State]], None]
# On a GPU a run of weights is updated by a few foreach kernels. Its temporary tensors take the
# memory of as many elements: 64 MiB in float32.
RUN_ELEMENTS = 16 << 20


def light(kind: type[Kind]) -> type[Kind]:
    """Derive from a torch optimizer a class without the wrappers that import torch's compiler.

    That import takes as long as importing torch itself.
    """
    methods = {
        "add_param_group": inspect.unwrap(torch.optim.Optimizer.add_param_group),
        "step": torch.no_grad()(inspect.unwrap(kind.step)),
    }
    return cast("type[Kind]", type(f"Light{kind.__name__}", (kind,), methods))


def allocate_state(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    weights: Mapping[str, nn.Parameter],
) -> None:
    """Fill the state with zeros now, so that a checkpoint can be loaded before the first step."""
    for name, weight in weights.items():
        shapes = settings.slot_shapes(name, tuple(weight.shape))
        for slot, shape in shapes.items():
            optimizer.state[weight][slot] = torch.zeros(
                shape, dtype=torch.float32, device=weight.device
            )


class GroupOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is a function: `update(group, weights, gradients, states)`.

    It changes weights and states in place. `group["steps"]` counts the steps, this one included.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(
        self, groups: list[Group], update: Update, others: torch.optim.Optimizer | None = None
    ) -> None:
        """`others`: an optimizer of other weights, which steps with this one."""
        super().__init__([{**group, "steps": 0} for group in groups], {})
        self._update, self._others = update, others
        self._runs = [(group, run) for group in self.param_groups for run in _runs(group["params"])]
        if others is not None:
            # Shared objects: the rate, the number of steps and the state are set through one list.
            self.param_groups += others.param_groups
            self.state.update(others.state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "steps" in group:
                group["steps"] += 1
        for group, run in self._runs:
            # A frozen weight has no gradient.
            weights: list[Tensor] = [weight for weight in run if weight.grad is not None]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if weights:
                self._update(group, weights, gradients, [self.state[w] for w in weights])
        if self._others is not None:
            self._others.step()


def _runs(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Cut a group into runs that are updated together: bounded on a GPU, single on the CPU."""
    runs: list[list[nn.Parameter]] = []
    filled = RUN_ELEMENTS
    for weight in weights:
        # On the CPU foreach is a loop: a weight alone stays in the cache, and needs less memory.
        if not weight.is_cuda or filled + weight.numel() > RUN_ELEMENTS:
            runs.append([])
            filled = 0
        runs[-1].append(weight)
        filled += weight.numel()
    return runs
