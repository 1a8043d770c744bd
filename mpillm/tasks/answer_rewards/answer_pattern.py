"""Reward an answer of a form: a regular expression."""

import re
from typing import TYPE_CHECKING, Self

from mpillm.errors import RecipeError
from mpillm.tasks.answer_rewards.answer_reward import AnswerReward

if TYPE_CHECKING:
    from mpillm.tasks.task_catalog import TaskSettings


class AnswerPattern(AnswerReward):
    """1 for an answer that the expression `task.reward_pattern` matches as a whole, else 0.

    A dot matches the end of a line, too.
    """

    def __init__(self, pattern: str) -> None:
        """Compile the expression. Raises RecipeError."""
        if not pattern:
            raise RecipeError(
                'the reward "pattern" compares answers with a regular expression, and '
                "task.reward_pattern names none; give one, such as '<think>.*</think>.+'"
            )
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as failure:
            raise RecipeError(
                f"task.reward_pattern = {pattern!r} is no regular expression: {failure}; correct it"
            ) from failure

    @classmethod
    def make(cls, settings: "TaskSettings") -> Self:
        return cls(settings.reward_pattern)

    def __call__(self, prompt: str, answer: str, reference: str) -> float:
        return float(self._pattern.fullmatch(answer) is not None)
