"""The file of a recipe: read whatever an editor made of it, and know the run that it is in."""

import os
import tomllib
from pathlib import Path
from typing import Any

from mpillm.errors import RecipeError
from mpillm.runs.folder import HISTORY, JOB, JOB_RECIPE, METRICS, RECIPE
from mpillm.runs.history import read_history
from mpillm.runs.run_files import read_job
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_text
from mpillm.weights.places import CHECKPOINTS, checkpoint_folders

# A recipe has some 50 short lines: a larger file is another one, such as a corpus.
LARGEST_BYTES = 1 << 20
# Sections, keys, lists and what a plug-in may nest in them.
DEEPEST = 8


def read_table(path: Path) -> dict[str, Any]:
    """Read a recipe's TOML. Raises RecipeError for whatever is not one."""
    text = _read_text(path)
    try:
        table = tomllib.loads(text)
        deep = _is_deep(table)
    except RecursionError:
        deep = True
    except ValueError as failure:
        if isinstance(failure, tomllib.TOMLDecodeError):
            raise RecipeError(f"the recipe {path} is not valid TOML: {failure}") from failure
        # Python reads no longer number; no setting is near that.
        raise RecipeError(
            f"the recipe {path} holds a number of more than 4,000 digits; a setting is less "
            "than 2^63"
        ) from failure
    if deep:
        raise RecipeError(
            f"the recipe {path} is nested too deeply; it has sections, keys and lists, no more"
        )
    return table


def _is_deep(table: dict[str, Any]) -> bool:
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _read_text(path: Path) -> str:
    try:
        text = read_text(path, LARGEST_BYTES)
    except OSError as failure:
        reason = explain(failure).removeprefix(f"{path}: ")
        raise RecipeError(
            f"cannot read the recipe {path}: {reason}; name a TOML file of sections and keys"
        ) from failure
    except ValueError as failure:
        # Another encoding, or a name with a NUL byte.
        raise RecipeError(
            f"cannot read the recipe {path}: {failure}; name a TOML file in UTF-8"
        ) from failure
    if "\0" in text:
        raise RecipeError(
            f"the recipe {path} holds zero bytes, as UTF-16 does; save it as UTF-8, "
            "or convert it with iconv"
        )
    return text


def own_run(path: Path, named: str) -> str:
    """Return the run's folder of a recipe: the folder that it is in, where that is a run's.

    `named`: the recipe's train.run. A run that was copied or moved has a recipe that names the old
    folder: the recipe at hand means the folder in which it is. Where that folder holds the named
    one, it is a project's.
    """
    folder = path.parent
    if path.name not in (RECIPE, JOB_RECIPE) or not _is_run(path):
        return named
    own, other = Path(os.path.realpath(folder)), Path(os.path.realpath(named))
    if own == other or (own in other.parents and not _is_surely_run(path, other)):
        return named
    return str(folder)


def _is_run(recipe: Path) -> bool:
    """Return whether training, or a submission, left its files next to the recipe."""
    folder = recipe.parent
    names = (HISTORY, METRICS, JOB) if recipe.name == JOB_RECIPE else (HISTORY, METRICS)
    return any((folder / name).is_file() for name in names) or _has_checkpoints(folder)


def _is_surely_run(recipe: Path, named: Path) -> bool:
    """Distinguish a moved run, entered by `cd`, from a project's folder with a recipe.

    In both its relative train.run leads to a place below the recipe's folder, `named`. In a run
    nothing is there, and its own records can be read.
    """
    folder = recipe.parent
    if os.path.lexists(named):
        return False
    submitted = recipe.name == JOB_RECIPE and bool(read_job(folder))
    return submitted or _has_checkpoints(folder) or bool(read_history(folder / HISTORY))


def _has_checkpoints(folder: Path) -> bool:
    try:
        return bool(checkpoint_folders(folder / CHECKPOINTS))
    except OSError:
        return False


def expand_home(path: str) -> str:
    """Replace a leading `~` as a shell does, which does not do so within `--set KEY=~/x`."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as failure:
        raise RecipeError(f"{path}: {failure}; write the whole path") from failure
