"""The file of a recipe: read whatever an editor made of it, and know the run that it is in."""

import codecs
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillm.errors import RecipeError
from mpillm.runs.folder import HISTORY, JOB, JOB_RECIPE, METRICS, RECIPE
from mpillm.system.messages import explain
from mpillm.weights.places import CHECKPOINTS

# A recipe has some 50 short lines: a larger file is another one, such as a corpus.
LARGEST_BYTES = 1 << 20
# Sections, keys, lists and what a plug-in may nest in them.
DEEPEST = 8
# Longest first: the mark of UTF-32 begins with that of UTF-16.
FOREIGN_MARKS: Mapping[bytes, str] = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# What training leaves in a run's folder.
LEFT_BY_TRAINING = (CHECKPOINTS, HISTORY, METRICS)


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
    contents = _read_bytes(path)
    if len(contents) > LARGEST_BYTES:
        raise RecipeError(
            f"the recipe {path} has more than {LARGEST_BYTES:,} bytes, so it is another file; "
            "name a TOML file of sections and keys"
        )
    for mark, encoding in FOREIGN_MARKS.items():
        if contents.startswith(mark):
            raise RecipeError(
                f"the recipe {path} is {encoding}, and TOML is UTF-8; "
                f"convert it: iconv -f {encoding} -t UTF-8"
            )
    if 0 in contents:
        raise RecipeError(
            f"the recipe {path} holds zero bytes, as UTF-16 does; save it as UTF-8, "
            "or convert it with iconv"
        )
    try:
        # Windows editors begin UTF-8 with a mark and end lines with CR LF; TOML knows the latter.
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = contents.count(b"\n", 0, failure.start) + 1
        raise RecipeError(
            f"the recipe {path} is not UTF-8: line {line} holds the byte "
            f"0x{contents[failure.start]:02X}; save it as UTF-8, or convert it with iconv"
        ) from failure


def _read_bytes(path: Path) -> bytes:
    """Read no more of a plain file than a recipe may have, and one byte. Raises RecipeError."""
    what = ""
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or a pipe"
        else:
            with path.open("rb") as file:
                return file.read(LARGEST_BYTES + 1)
    except OSError as failure:
        reason = explain(failure).removeprefix(f"{path}: ")
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from failure
    except ValueError as failure:
        # A name with a NUL byte.
        raise RecipeError(f"cannot read the recipe {path}: {failure}; check the name") from failure
    raise RecipeError(f"the recipe {path} is {what}; name a TOML file")


def own_run(path: Path, named: str) -> str:
    """Return the run's folder of a recipe: the folder that it is in, where that is a run's.

    `named`: the recipe's train.run. A run that was copied or moved has a recipe that names the old
    folder: the recipe at hand means the folder in which it is.
    """
    folder = path.parent
    left = (*LEFT_BY_TRAINING, JOB) if path.name == JOB_RECIPE else LEFT_BY_TRAINING
    in_run = path.name in (RECIPE, JOB_RECIPE) and any((folder / name).exists() for name in left)
    if not in_run or os.path.realpath(folder) == os.path.realpath(named):
        return named
    return str(folder)


def expand_home(path: str) -> str:
    """Replace a leading `~` as a shell does, which does not do so within `--set KEY=~/x`."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as failure:
        raise RecipeError(f"{path}: {failure}; write the whole path") from failure
