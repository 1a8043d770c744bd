"""The base of all optimizers: settings, how to build one, its rate and steps.

An optimizer is one file. Its settings class is the recipe's section [optimizer]; the module imports
torch in `build` alone, so that a login node without torch can check a recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class OptimizerSettings(ABC):
    """The settings of every optimizer: a learning rate over the steps, and clipping."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Its state tensors, each of its weight's shape: their keys in torch's state, and their names
    in a checkpoint.
    """
    state_bytes_per_parameter: ClassVar[int] = 0

    name: str = ""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    schedule: Literal["cosine", "linear", "constant-then-decay"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] = 100
    decay_share: Share = 0.2
    """constant-then-decay: the share of all steps, at the end, over which the rate falls."""
    final_share: Share = 0.1
    """The rate at the last step, as a share of `learning_rate`."""
    clip: Annotated[float, Ge(0)] = 1.0
    """The largest global norm of the gradients; 0: no clipping."""

    @abstractmethod
    def build(self, weights: Iterable["nn.Parameter"]) -> "Optimizer":
        """Make the optimizer over `weights`, its state allocated; imports torch."""

    @abstractmethod
    def describe(self) -> str:
        """Return the main settings in one line, for the printed plan."""


def set_rate(optimizer: "Optimizer", rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_steps(optimizer: "Optimizer", steps: int) -> None:
    """Set the number of steps taken: Adam and its relatives correct their averages by it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
