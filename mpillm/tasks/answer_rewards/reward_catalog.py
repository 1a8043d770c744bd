"""The table of rewards by name, and the weighted sum of those that a recipe names."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpillm.errors import DataError, RecipeError, UsageError
from mpillm.system.plugins import is_plugin, load_plugin
from mpillm.tasks.answer_rewards.answer_reward import AnswerReward, RewardFunction

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings

REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "exact": "mpillm.tasks.answer_rewards.exact_answer:exact_answer",
        "number": "mpillm.tasks.answer_rewards.last_number:last_number",
        "pattern": "mpillm.tasks.answer_rewards.answer_pattern:AnswerPattern",
    }
)
DEFAULT = ("exact",)


@dataclass(frozen=True)
class AnswerRewards:
    """The rewards of a run, each with its weight; an answer earns their sum."""

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]

    def each(self, prompt: str, answer: str, reference: str) -> list[float]:
        """Return what an answer earns by each reward, without weights. Raises DataError."""
        return [
            _value(name, function, (prompt, answer, reference))
            for name, function in self.functions.items()
        ]

    def total(self, values: list[float]) -> float:
        """Add up the values of `each`, weighted."""
        return math.fsum(
            weight * value for weight, value in zip(self.weights.values(), values, strict=True)
        )


def check_rewards(names: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """Raise RecipeError for names that can be no rewards, and for weights of another number."""
    for name in names:
        if name not in REWARDS and not is_plugin(name):
            raise RecipeError(
                f"rewards names {name!r}, and the rewards are {', '.join(REWARDS)}, or your own "
                "as package.module:Name"
            )
    if not names or len(set(names)) < len(names):
        raise RecipeError(
            f"rewards = {list(names)}: name at least one, and none of them twice; "
            f"there are {', '.join(REWARDS)}"
        )
    if weights and len(weights) != len(names):
        raise RecipeError(
            f"reward_weights has {len(weights)} numbers and rewards {len(names)} names; give "
            "each reward its weight, or leave reward_weights out"
        )


def make_rewards(settings: "TaskSettings") -> AnswerRewards:
    """Make the rewards of a run. Raises UsageError and RecipeError."""
    names = settings.rewards
    weights = settings.reward_weights or (1.0,) * len(names)
    functions = {name: _make(name, settings) for name in names}
    return AnswerRewards(functions, dict(zip(names, weights, strict=True)))


def _make(name: str, settings: "TaskSettings") -> RewardFunction:
    found = load_plugin(name, REWARDS, "reward")
    if isinstance(found, type) and issubclass(found, AnswerReward):
        return found.make(settings)
    if isinstance(found, type) or not callable(found):
        raise UsageError(
            f"the reward {name} must name a function of (prompt, answer, reference), or a class "
            f"that derives from {AnswerReward.__module__}.{AnswerReward.__name__}, not {found!r}"
        )
    function: RewardFunction = found
    return function


def _value(name: str, function: RewardFunction, given: tuple[str, str, str]) -> float:
    """Compute a reward. Raises DataError where it is no finite number, or the function fails."""
    said = f"for the answer {reprlib.repr(given[1])} to {reprlib.repr(given[0])}"
    try:
        value = function(*given)
    # A function of the user's may raise anything: all ranks are to stop with its words.
    except Exception as failure:
        raise DataError(
            f"the reward {name} failed {said}: {type(failure).__name__}: {failure}; correct it"
        ) from failure
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"the reward {name} is {value!r} {said}, and a reward is a finite number; correct it, "
            "such as to 0 where an answer cannot be checked"
        )
    return number
