"""Places of a run's checkpoints in the file system, without torch.

A checkpoint is a folder `checkpoints/step-00001000`: `step-` and at least eight digits, nothing
else. A temporary or half-removed one has another name, so no reader takes it for a checkpoint.
"""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
INDEX = "index.json"
NAME = re.compile(r"step-(\d{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """Name the checkpoint of `step` in `folder`."""
    return folder / f"step-{step:08d}"


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """List the checkpoints in `folder` by step, the oldest first; none where there is no folder."""
    if not folder.is_dir():
        return {}
    names = ((NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in names if match))
