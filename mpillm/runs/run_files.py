"""The small files of a run's folder: its recipe and the record of its job. Damage is no failure."""

import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.runs import folder as names
from mpillm.runs.folder import JOB, JOB_RECIPE, LOCK, RECIPE
from mpillm.system.json_lines import whole_number
from mpillm.system.json_text import from_json
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_text
from mpillm.tokens.dataset_folder import dataset_around

# The keys of job.json that are read back.
JOB_TEXTS = ("scheduler", "id", "name", "partition", "account", "folder", "output")
JOB_COUNTS = ("nodes", "ranks_per_node", "threads", "gpus_per_node", "seconds")


# Written by training alone, which holds the run's lock.
TRAINED = (RECIPE, names.METRICS, names.PICTURE, names.TRACE, names.HISTORY, names.OUTCOME)
# Other verbs may be writing these now; no file of theirs takes that long.
WRITTEN = (LOCK, names.REPORT, JOB, JOB_RECIPE, names.JOB_SCRIPT, names.CLUSTER)
WRITTEN_SECONDS = 120.0
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.ASCII)
_LOCK_ASIDE = re.compile(rf"\.{re.escape(LOCK)}\.[0-9a-f]{{32}}\.left", re.ASCII)


def refuse_dataset(run: Path) -> None:
    """Raise UsageError for a run that is, or is inside of, a dataset's folder."""
    if dataset := dataset_around(run):
        raise UsageError(
            f"the run {run} is inside of the dataset {dataset}, and a dataset's folder holds "
            "nothing else; name another train.run"
        )


def remove_leftover_files(run: Path) -> None:
    """Remove the temporary files that a killed job left in a run's folder.

    The caller holds the run's lock. What cannot be removed stays.
    """
    for path in list(run.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        name = found[1] if found else LOCK if _LOCK_ASIDE.fullmatch(path.name) else ""
        with suppress(OSError):
            old = time.time() - path.lstat().st_mtime > WRITTEN_SECONDS
            if (name in TRAINED or (name in WRITTEN and old)) and not path.is_dir():
                path.unlink()


def read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """Read the sections of a resolved recipe; empty with the reason where it cannot be read."""
    return _read(path, tomllib.loads)


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


def moved_from(run: Path, recipe: Mapping[str, Any], begun: object = None) -> str:
    """Return the folder that a run's recipe names where that is not `run`; "" where it is.

    `begun`: the folder in which the run was begun, if known: relative paths begin there.
    """
    train = recipe.get("train")
    own = train.get("run") if isinstance(train, dict) else None
    if not isinstance(own, str) or not own or folder_of_paths(run, recipe):
        return ""
    # Links and `..` may lead to the run.
    begins = [Path.cwd(), *([Path(begun)] if isinstance(begun, str) else [])]
    # By text, too: the folder may be unreadable, or gone meanwhile.
    same = os.path.normpath(Path.cwd() / own) == os.path.normpath(Path.cwd() / run)
    return "" if same or any(_same(begin / own, run) for begin in begins) else own


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


def _read(path: Path, parse: Callable[[str], Any]) -> tuple[dict[str, Any], str]:
    try:
        value = parse(read_text(path))
    except FileNotFoundError:
        return {}, f"{path.name} is a link to nothing" if path.is_symlink() else ""
    except OSError as failure:
        return {}, f"{path.name} cannot be read: {explain(failure, path)}"
    except (ValueError, RecursionError) as failure:
        return {}, f"{path.name} cannot be read: {failure}"
    if not isinstance(value, dict):
        return {}, f"{path.name} cannot be read: it holds no JSON object"
    return value, ""
