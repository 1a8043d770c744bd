"""Places of a dataset in the file system, for rooms that read no tokens."""

import os
from pathlib import Path
from typing import Any

from mpillm.system.json_text import read_json

MANIFEST, FORMAT = "manifest.json", "mpillm.tokens"
PAIR_FORMAT = "mpillm.pairs"
FOLD = "fold-{}"
"""The folder of a fold, from 1, within the one that `prepare --folds` makes."""


def is_dataset(folder: Path) -> bool:
    """Return whether `folder` is a prepared dataset: it holds a manifest of ours."""
    return _manifest(folder).get("format") in (FORMAT, PAIR_FORMAT)


def dataset_hash(folder: Path) -> str:
    """Return the hash that a dataset's manifest names; "" without one, as earlier ones are."""
    found = _manifest(folder).get("digest")
    return found if isinstance(found, str) else ""


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        value = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def dataset_around(path: Path) -> Path | None:
    """Return the dataset that `path` is or is inside of; None where it is in none."""
    whole = Path(os.path.realpath(path))
    return next((folder for folder in (whole, *whole.parents) if is_dataset(folder)), None)
