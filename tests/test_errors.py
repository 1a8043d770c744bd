"""Each error is the user's to mend, and tells the shell which kind it was."""

import re
from typing import Any

import pytest

from mpillm import errors
from mpillm.errors import DataError, MismatchError, MpillmError, RecipeError, UsageError

TREE: dict[str, Any] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type)
}


def test_every_error_stems_from_the_root() -> None:
    assert all(issubclass(error, MpillmError) for error in TREE.values())
    assert issubclass(MismatchError, DataError)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (
            1,
            {
                "MpillmError",
                "LaunchError",
                "CommError",
                "DataError",
                "MismatchError",
                "CheckpointError",
            },
        ),
        (2, {"UsageError", "RecipeError", "LayoutError"}),
        (3, {"DivergedError"}),
    ],
)
def test_exit_codes(code: int, names: set[str]) -> None:
    assert {name for name, error in TREE.items() if error.exit_code == code} == names


def test_the_drawn_tree_names_each_error_once() -> None:
    assert sorted(re.findall(r"\b[A-Z]\w+Error\b", errors.__doc__ or "")) == sorted(TREE)


def test_a_recipe_error_may_be_raised_where_a_value_error_is_expected() -> None:
    with pytest.raises(ValueError, match="steps"):
        raise RecipeError("train.steps must be positive")
    assert not issubclass(UsageError, ValueError)
