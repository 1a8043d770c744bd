"""Places of a run's checkpoints in the file system, without torch.

A checkpoint is a folder `checkpoints/step-00001000`: `step-` and the step in eight digits, or in
more from 10^8 on. Nothing else is: not `step-best`, not `step-00001000.keep`, not a hidden folder.
"""

import os
import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
INDEX = "index.json"
BEST = "best"
"""In a folder of checkpoints: a link to the best one."""
# One spelling a number, so that no two folders have the same step.
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)


def step_folder(folder: Path, step: int) -> Path:
    """Name the checkpoint of `step` in `folder`."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Read the step in the name of a checkpoint's folder; None for another name."""
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """List the checkpoints in `folder` by step, the oldest first; none where there is no folder.

    A link to a folder is listed, for a checkpoint may be on another disk; a file is not.
    """
    try:
        with os.scandir(folder) as entries:
            found = [
                (step, folder / entry.name)
                for entry in entries
                if (step := step_of(Path(entry.name))) is not None and _is_folder(entry)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return dict(sorted(found))


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that its link names as the best; None without one."""
    try:
        found = folder / (folder / BEST).readlink()
    except OSError:
        return None
    step = step_of(found)
    named = step is not None and found == step_folder(folder, step)
    return found if named and found.is_dir() else None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads in a circle, or to a place that cannot be read.
        return False
