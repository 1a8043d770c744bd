"""A run's recipe as flat settings."""

from pathlib import Path

import pytest

from mpillm.runs.folder import RECIPE
from mpillm.runs.sinks.run_settings import run_settings


def test_a_recipe_is_flat(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text('seed = 3\n[train]\nsteps = 4\nsinks = ["wandb"]\n')
    assert run_settings(tmp_path) == {"seed": 3, "train.steps": 4, "train.sinks": ["wandb"]}


def test_a_run_without_a_recipe_has_none(tmp_path: Path) -> None:
    assert run_settings(tmp_path) == {}


def test_a_damaged_recipe_raises(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text("[train\n")
    with pytest.raises(ValueError, match="Expected"):
        run_settings(tmp_path)
