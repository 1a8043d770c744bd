"""Folders of saves and removals that a killed job left, and how to recognise what is ours.

A folder is ours by its name, which cannot be predicted, and by a marker inside. Anything else in
`checkpoints/` belongs to its user and is never removed, renamed or followed.
"""

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from mpillm.system.json_text import read_json
from mpillm.weights.index import FORMAT
from mpillm.weights.places import INDEX

MARKER = "unfinished"
_TEMPORARY = re.compile(r"\.step-\d{8,}\.[0-9a-f]{16}\.(?:tmp|trash)", re.ASCII)
# What a checkpoint holds even where its index cannot be read.
_USUAL = re.compile(r"rank-\d{5,}\.h5|index\.json|tokenizer\.json|unfinished", re.ASCII)


def temporary_folder(target: Path) -> Path:
    """Make the folder in which the checkpoint `target` is written; it is renamed when whole."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    # The run's folder itself is not made: it may have been moved while the run trains.
    path.parent.mkdir(exist_ok=True)
    path.mkdir()
    (path / MARKER).touch(exist_ok=False)
    return path


def is_own(folder: Path) -> bool:
    """Return whether `folder` is a checkpoint, perhaps a damaged one, with nothing of its user.

    A link is not, nor is a folder with a file that the checkpoint's index does not list.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    listed = _listed(folder)
    with os.scandir(folder) as entries:
        return all(
            (_USUAL.fullmatch(entry.name) or entry.name in listed)
            and entry.is_file(follow_symlinks=False)
            for entry in entries
        )


def remove(folder: Path) -> None:
    """Remove a folder of ours; cut short, the rest is recognised and removed at the next start.

    Raises OSError.
    """
    if not _TEMPORARY.fullmatch(folder.name):
        # Renamed first: half a checkpoint never has a real name.
        trash = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.trash")
        folder = folder.rename(trash)
    with suppress(OSError):
        # On a full disk the index, removed last but one, is the marker.
        (folder / MARKER).touch()
    last = (INDEX, MARKER)
    for path in sorted(folder.iterdir(), key=lambda path: (path.name in last, path.name)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def remove_leftovers(folder: Path) -> int:
    """Remove what killed saves and removals left in `folder`; return how many there were.

    The caller holds the run's lock, so that no other job is writing one of them.
    """
    if not folder.is_dir():
        return 0
    count = 0
    for path in list(folder.iterdir()):
        # What cannot be read or removed now is no reason not to train.
        with suppress(OSError):
            if _is_leftover(path):
                count += 1
                remove(path)
    return count


def _is_leftover(path: Path) -> bool:
    if not _TEMPORARY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    # One that was just made, or is removed but for its name, is empty.
    return (path / MARKER).is_file() or bool(_listed(path)) or not any(path.iterdir())


def _listed(folder: Path) -> tuple[str, ...]:
    """List the files that a checkpoint's index names; none where it cannot be read."""
    try:
        index = read_json(folder / INDEX)
        return tuple(index["files"]) if index["format"] == FORMAT else ()
    except (OSError, ValueError, TypeError, KeyError):
        return ()
