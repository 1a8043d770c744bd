"""The base of rewards that need settings; a reward without any may be a plain function."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings

RewardFunction = Callable[[str, str, str], float]
"""`reward(prompt, answer, reference)`: what an answer earns, a finite number."""


class AnswerReward(ABC):
    """A reward. Calling it gives what an answer earns."""

    @classmethod
    def make(cls, settings: "TaskSettings") -> Self:
        """Make the reward of a run. Raises RecipeError for settings that it cannot have."""
        return cls()

    @abstractmethod
    def __call__(self, prompt: str, answer: str, reference: str) -> float:
        """Return what `answer` earns; `reference`: the answer of the data."""
