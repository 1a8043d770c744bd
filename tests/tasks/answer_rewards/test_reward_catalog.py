"""Rewards of answers: the built-in ones, functions of the user's, weights, and faults."""

import re

import pytest

from mpillm.errors import DataError, MpillmError, RecipeError, UsageError
from mpillm.tasks.answer_rewards.reward_catalog import make_rewards
from mpillm.tasks.task_catalog import TaskSettings

HERE = "tests.tasks.answer_rewards.test_reward_catalog"


def shortness(prompt: str, answer: str, reference: str) -> float:
    return 1 / len(answer)


def nothing(prompt: str, answer: str, reference: str) -> float:
    return float("nan")


def no_number(prompt: str, answer: str, reference: str) -> None:
    return None


def value(answer: str, reference: str, *names: str, **more: object) -> float:
    rewards = make_rewards(TaskSettings("grpo", rewards=names, **more))  # type: ignore[arg-type]
    return rewards.total(rewards.each("p", answer, reference))


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("so 3 + 4 = 7", "#### 7", 1),
        ("7 or 8", "7", 0),
        ("it costs $1,234.50.", "1234.5", 1),
        ("12-5", "5", 1),
        ("x = -5", "-5", 1),
        ("\u22125", "-5", 1),
        ("1,23", "23", 1),
        ("none", "7", 0),
        ("none", "none", 0),
        ("9007199254740993", "9007199254740992", 0),
        ("007", "7", 1),
    ],
)
def test_the_last_number(answer: str, reference: str, expected: float) -> None:
    assert value(answer, reference, "number") == expected


def test_the_exact_answer_and_a_pattern() -> None:
    assert value(" 7\n", "7", "exact") == 1
    assert value("7.0", "7", "exact") == 0
    form = {"reward_pattern": r"<think>.*</think>\s*\d+"}
    assert value("<think>a\nb</think> 7", "", "pattern", **form) == 1
    assert value("<think>a</think> 7!", "", "pattern", **form) == 0


def test_rewards_are_weighted_and_summed() -> None:
    names = ("exact", f"{HERE}:shortness")
    assert value("1234", "1234", *names) == 1.25
    assert value("1234", "1234", *names, reward_weights=(2.0, -4.0)) == 1.0


@pytest.mark.parametrize(
    ("names", "more", "kind", "message"),
    [
        (("exat",), {}, RecipeError, r"rewards names 'exat', and the rewards are exact, number"),
        ((), {}, RecipeError, r"rewards = \[\]: name at least one"),
        (("exact", "exact"), {}, RecipeError, r"none of them twice"),
        (("exact",), {"reward_weights": (1.0, 2.0)}, RecipeError, r"has 2 numbers and rewards 1"),
        (("pattern",), {}, RecipeError, r"task\.reward_pattern names none; give one"),
        (("pattern",), {"reward_pattern": "("}, RecipeError, r"'\(' is no regular expression: "),
        ((f"{HERE}:missing",), {}, UsageError, r"has no missing"),
        ((f"{HERE}:HERE",), {}, UsageError, r"must name a function of \(prompt, answer, refer"),
        ((f"{HERE}:nothing",), {}, DataError, r"nothing is nan for the answer 'a' to 'p', and a"),
        ((f"{HERE}:no_number",), {}, DataError, r"no_number is None for the answer 'a' to 'p'"),
        ((f"{HERE}:shortness",), {}, DataError, r"shortness failed .* ZeroDivisionError: "),
    ],
)
def test_wrong_rewards_are_refused(
    names: tuple[str, ...], more: dict[str, object], kind: type[MpillmError], message: str
) -> None:
    answer = "" if "failed" in message else "a"
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        value(answer, "", *names, **more)
