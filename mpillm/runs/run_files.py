"""The small files of a run's folder: its recipe and the record of its job. Damage is no failure."""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpillm.runs.folder import JOB, JOB_RECIPE, RECIPE
from mpillm.system.json_lines import whole_number
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_plain

# The keys of job.json that are read back.
JOB_TEXTS = ("scheduler", "id", "name", "partition", "account", "folder", "output")
JOB_COUNTS = ("nodes", "ranks_per_node", "threads", "gpus_per_node", "seconds")


def read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """Read the sections of a resolved recipe; empty with the reason where it cannot be read."""
    return _read(path, lambda data: tomllib.loads(data.decode("utf-8-sig")))


def recipe_of(run: Path) -> Path | None:
    """Return the recipe in a run's folder, None where none can be read.

    Before training began only the job's recipe is there.
    """
    paths = (run / RECIPE, run / JOB_RECIPE)
    return next((path for path in paths if read_recipe(path)[0]), None)


def folder_of_paths(run: Path, recipe: Mapping[str, Any]) -> Path | None:
    """Return the folder in which a recipe's relative paths begin; None where that is not known.

    It is known where `train.run` is a relative path that leads to `run` from there.
    """
    train = recipe.get("train")
    own = train.get("run") if isinstance(train, dict) else None
    parts, whole = Path(own).parts if isinstance(own, str) else (), run.resolve()
    ends_so = parts and whole.parts[-len(parts) :] == parts and len(parts) < len(whole.parts)
    return whole.parents[len(parts) - 1] if ends_so else None


def moved_from(run: Path, recipe: Mapping[str, Any]) -> str:
    """Return the folder that a run's recipe names where that is not `run`; "" where it is."""
    train = recipe.get("train")
    own = train.get("run") if isinstance(train, dict) else None
    if not isinstance(own, str) or not own or folder_of_paths(run, recipe):
        return ""
    # An absolute path may lead to the run by links.
    return "" if Path(own).is_absolute() and _same(Path(own), run) else own


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def read_job(run: Path) -> dict[str, Any]:
    """Read the record of the run's newest job; empty without one that can be read."""
    return read_job_record(run)[0]


def read_job_record(run: Path) -> tuple[dict[str, Any], str]:
    """Read the record of the run's newest job; empty with the reason where it cannot be read."""
    value, damage = _read(run / JOB, from_json)
    return _checked_job(value), damage


def _checked_job(value: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys whose values have their types."""
    texts = {key: value[key] for key in JOB_TEXTS if isinstance(value.get(key), str)}
    counts = {key: whole_number(value.get(key)) for key in JOB_COUNTS}
    return texts | {key: count for key, count in counts.items() if count is not None}


def _read(path: Path, parse: Callable[[bytes], Any]) -> tuple[dict[str, Any], str]:
    try:
        value = parse(read_plain(path))
    except FileNotFoundError:
        return {}, f"{path.name} is a link to nothing" if path.is_symlink() else ""
    except OSError as failure:
        return {}, f"{path.name} cannot be read: {explain(failure, path)}"
    except (ValueError, RecursionError) as failure:
        return {}, f"{path.name} cannot be read: {failure}"
    if not isinstance(value, dict):
        return {}, f"{path.name} cannot be read: it holds no JSON object"
    return value, ""
