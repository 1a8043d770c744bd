"""A run's resolved recipe as flat settings, for services that compare runs by them."""

import tomllib
from pathlib import Path
from typing import Any

from mpillm.runs.folder import RECIPE


def run_settings(run: Path) -> dict[str, Any]:
    """Give `section.key` → value of the recipe in `run`; nothing where there is none yet.

    Raises OSError and ValueError for a recipe that cannot be read.
    """
    path = run / RECIPE
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for section, values in tomllib.loads(path.read_text()).items():
        if isinstance(values, dict):
            found |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            found[section] = values
    return found
