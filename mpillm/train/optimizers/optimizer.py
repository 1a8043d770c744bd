"""The base of all optimizers: settings, groups of weights, state, rate and steps.

An optimizer is one file. Its settings class is the recipe's section [optimizer]; the module imports
torch in `build` alone, so that a login node without torch can check a recipe.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen

from mpillm.errors import LayoutError, RecipeError
from mpillm.models.spec import ModelSpec, Part

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Share = Annotated[float, Ge(0), Le(1)]
Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0)]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class GroupRule:
    """A rule of `optimizer.groups`: matching weights take another rate, or another decay."""

    match: Annotated[str, MinLen(1)]
    """A glob on the weight's name, such as `layers.*.norm.weight`; `*` matches dots, too."""
    rate: Annotated[float, Ge(0)] = 1.0
    """The factor on the learning rate; 0: the weights stay as they are."""
    decay: Decay | None = None
    """The weight decay; left out: that of the optimizer."""


@dataclass(frozen=True)
class OptimizerSettings(ABC):
    """The settings of every optimizer: a learning rate over the steps, groups, and clipping."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Its state tensors: their keys in torch's state, and their names in a checkpoint."""
    state_bytes_per_parameter: ClassVar[int] = 0
    elementwise: ClassVar[bool] = True
    """Whether the update of an element depends on that element's gradient and state alone.

    Otherwise the optimizer needs whole weights: it refuses slices of them.
    """

    name: str = ""
    learning_rate: Rate = 1e-3
    schedule: Literal["cosine", "linear", "constant-then-decay", "cosine-restarts"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] = 100
    decay_share: Share = 0.2
    """constant-then-decay: the share of all steps, at the end, over which the rate falls."""
    period: Annotated[int, Ge(0)] = 0
    """cosine-restarts: the steps of the first cycle."""
    period_factor: Annotated[float, Ge(1), Le(10)] = 2.0
    """cosine-restarts: how many times as long each cycle is as the one before."""
    final_share: Share = 0.1
    """The rate at the last step (of a cycle), as a share of `learning_rate`."""
    clip: Annotated[float, Ge(0)] = 1.0
    """The largest global norm of the gradients; 0: no clipping."""
    clip_value: Annotated[float, Ge(0)] = 0.0
    """The largest magnitude of a gradient's element, ahead of `clip`; 0: no clipping."""
    groups: tuple[GroupRule, ...] = ()
    """Rates and decays by the names of weights: the first rule that matches counts."""

    def __post_init__(self) -> None:
        if self.schedule == "cosine-restarts" and not self.period:
            raise RecipeError(
                "optimizer.schedule = cosine-restarts needs the steps of its first cycle, and "
                "optimizer.period is 0; set it to a number of steps, such as 1000"
            )

    @abstractmethod
    def build(self, weights: "Mapping[str, nn.Parameter]") -> "Optimizer":
        """Make the optimizer over `weights` (name → Parameter), its state allocated; imports torch.

        The names are those of the whole model. The weights may be float32 copies that the caller
        keeps: of a weight only `data`, `grad` and the shape are read.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the main settings in one line, for the printed plan."""

    def describe_rate(self) -> str:
        """Return rate, schedule and groups in words, for `describe`."""
        cycles = f" of {self.period:,} steps × {self.period_factor:g}ⁿ"
        schedule = self.schedule + cycles * (self.schedule == "cosine-restarts")
        rules = f", {len(self.groups)} rule(s) for groups" if self.groups else ""
        return f"rate {self.learning_rate:g}, {schedule}, warm-up {self.warmup_steps} steps{rules}"

    @classmethod
    def needs_whole(cls, name: str, shape: Shape) -> bool:
        """Return whether the update needs all of the weight `name` of `shape`."""
        return not cls.elementwise

    @classmethod
    def slot_shapes(cls, name: str, shape: Shape) -> Mapping[str, Shape]:
        """Return the state of the weight `name` of `shape`: slot → shape; all of it is float32.

        Here each slot has the weight's shape. A slot of fewer elements keeps the number of dims,
        1 for each that is reduced: a cut of the weight is then a cut of the slot.
        """
        return dict.fromkeys(cls.slots, shape)

    def state_bytes(self, model: ModelSpec, part: Part) -> int:
        """Estimate the bytes of state for `part` of `model`."""
        return self.state_bytes_per_parameter * model.parameters_of(part)

    def parameter_groups(
        self, weights: "Mapping[str, nn.Parameter]", decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Cut `weights` into torch's groups, one for each factor on the rate and each decay.

        `decay`: of matrices that no rule gives another one. Vectors then have none, for decay of
        norms and biases would pull them to 0, not to a simpler function.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, weight in weights.items():
            rule = next((rule for rule in self.groups if fnmatchcase(name, rule.match)), None)
            own = rule.decay if rule else None
            if own is None:
                own = decay if len(whole_shape(weight)) > 1 else 0.0
            groups.setdefault((rule.rate if rule else 1.0, own), []).append(weight)
        if not groups:
            # A stage whose weights are all frozen: torch refuses an optimizer without a group.
            groups[1.0, decay] = []
        return [
            {"params": members, "lr": self.learning_rate * rate, "rate": rate, "weight_decay": own}
            for (rate, own), members in groups.items()
        ]


def make_optimizer(
    settings: OptimizerSettings, weights: "Mapping[str, nn.Parameter]"
) -> "Optimizer":
    """Build the optimizer. Raises RecipeError where there are rules that it does not read."""
    optimizer = settings.build(weights)
    if settings.groups and any("rate" not in group for group in optimizer.param_groups):
        raise RecipeError(
            f"optimizer.groups: the optimizer {settings.name} makes no groups of weights; leave "
            "the rules out, or let its `build` call `parameter_groups`"
        )
    return optimizer


def check_rules(rules: Sequence[GroupRule], names: Iterable[str], tied: Mapping[str, str]) -> None:
    """Raise RecipeError for a rule that no weight follows.

    `names`: those of the whole model, whatever part of it a rank holds. `tied`: follower → leader.
    """
    left = set(known := list(names))
    for number, rule in enumerate(rules):
        found = {name for name in known if fnmatchcase(name, rule.match)}
        if not found & left:
            raise RecipeError(
                f"optimizer.groups[{number}].match = {rule.match!r} "
                f"{_why_unused(rule.match, bool(found), known, tied)}"
            )
        left -= found


def _why_unused(pattern: str, hidden: bool, names: Sequence[str], tied: Mapping[str, str]) -> str:
    """Explain why no weight follows a rule, with the remedy."""
    if hidden:
        return (
            "matches only weights that earlier rules match, and the first match counts; move it "
            "ahead of them, or leave it out"
        )
    for follower, leader in tied.items():
        if fnmatchcase(follower, pattern):
            return f"matches {follower}, which is the weight {leader}; match that name"
    # Blocks have the same weights: one name serves for all of them.
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    near = get_close_matches(pattern, kinds, n=3, cutoff=0.4) or kinds[:3]
    return f"matches no weight of the model; the nearest names are {', '.join(near)}"


def check_whole(
    settings: OptimizerSettings, stepped: Mapping[str, Shape], whole: Mapping[str, Shape]
) -> None:
    """Raise LayoutError where a weight is cut that the optimizer needs whole.

    `stepped`: the shapes of what it steps on, by name. `whole`: those of the whole model.
    """
    cut = [
        name
        for name, shape in stepped.items()
        if shape != whole[name] and settings.needs_whole(name, whole[name])
    ]
    if cut:
        raise LayoutError(
            f"the optimizer {settings.name} needs whole weights, and this layout cuts {cut[0]} "
            f"from {list(whole[cut[0]])} to {list(stepped[cut[0]])}; take adamw, lion or sgd, or "
            "a layout that cuts no weight"
        )


def whole_shape(weight: "nn.Parameter") -> Shape:
    """Return the shape of the weight of which `weight` may be a run of elements."""
    return tuple(getattr(weight, "whole_shape", weight.shape))


def set_rate(optimizer: "Optimizer", rate: float) -> None:
    """Set the learning rate of the next step; each group has a factor of its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def set_steps(optimizer: "Optimizer", steps: int) -> None:
    """Set the number of steps taken: Adam and its relatives correct their averages by it."""
    for group in optimizer.param_groups:
        if "steps" in group:
            group["steps"] = steps
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)
