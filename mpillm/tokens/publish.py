"""Give a prepared dataset its name; of another there, remove only what its manifest lists."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from mpillm.errors import DataError, UsageError
from mpillm.system.atomic import flush, write_json
from mpillm.system.json_text import read_json
from mpillm.system.messages import why
from mpillm.system.plain_files import is_plain_name
from mpillm.tokens.dataset_folder import FORMAT, is_dataset
from mpillm.tokens.manifest import NAME, UNFINISHED, Manifest
from mpillm.tokens.shards import VERSION
from mpillm.tokens.work_folder import is_work_folder, place_of, taken_over

SHOWN = 5


def holds_dataset(out: Path) -> bool:
    """Return whether `out` is a dataset of ours, whole or damaged.

    False for an empty folder and where there is none. Raises UsageError for anything else: it must
    not be replaced.
    """
    try:
        names = [path.name for path in out.iterdir() if not is_work_folder(path.name)]
    except FileNotFoundError:
        return False
    except (NotADirectoryError, ValueError) as failure:
        raise UsageError(f"{out} is no folder; choose another --out, or move it away") from failure
    except OSError as failure:
        raise UsageError(
            f"cannot read the folder {out}: {failure.strerror}; choose another --out"
        ) from failure
    if not names:
        return False
    if is_dataset(out):
        return True
    if NAME in names:
        try:
            read_json(out / NAME)
        except (OSError, ValueError) as failure:
            raise UsageError(
                f"{out / NAME} cannot be read ({why(failure)}), so which files of {out} are a "
                "dataset is not known; choose another --out, or remove the folder yourself"
            ) from failure
    raise UsageError(
        f"{out} exists and is not a prepared dataset; choose another --out, or move it away"
    )


def listed_files(out: Path) -> list[str]:
    """Return the names of the dataset's files in `out`, by its manifest. Raises UsageError."""
    try:
        value = read_json(out / NAME)
        names = value.get(UNFINISHED)
        if isinstance(names, list) and all(map(is_plain_name, names)):
            return names
        return Manifest.load(out).files
    except (OSError, ValueError, DataError) as failure:
        raise UsageError(
            f"which files of {out} are its dataset is not known ({why(failure)}); choose another "
            "--out, or remove the folder yourself"
        ) from failure


def publish(dataset: Path, out: Path, overwrite: bool, say: Callable[[str], None]) -> bool:
    """Make the folder `dataset` the folder `out`, on one file system.

    With `overwrite`, the files of an earlier dataset there are replaced, and what else the folder
    holds is kept and named. False where another dataset is there and must not be replaced.
    """
    flush(dataset)
    try:
        if place_of(out) != out:
            # An empty folder is replaced, anything else fails: so the first of several jobs wins.
            dataset.rename(out)
            flush(out.parent)
            return True
    except OSError as failure:
        if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if holds_dataset(out) and not overwrite:
        return False
    _replace(dataset, out, say)
    return True


def _replace(dataset: Path, out: Path, say: Callable[[str], None]) -> None:
    """Move the files of `dataset` into `out`, in place of those of the dataset there.

    Meanwhile the manifest there is one that no reader takes, and that lists the files of both: a
    job that is killed here leaves what the next one replaces.
    """
    old = listed_files(out) if (out / NAME).exists() else []
    new = Manifest.load(dataset).files
    for name in new:
        path = out / name
        if _is_folder(path) or (name not in (NAME, *old) and os.path.lexists(path)):
            raise UsageError(
                f"{path} is not of the dataset that is there, and the new one has a file of this "
                "name; move it away, or choose another --out"
            )
    both = sorted({*old, *new})
    write_json(out / NAME, {"format": FORMAT, "version": VERSION, UNFINISHED: both})
    for name in old:
        path = out / name
        if not dataset.exists():
            # Another job has taken this one for dead, and may have put its own shards there.
            raise UsageError(taken_over(out))
        if name != NAME and not _is_folder(path):
            path.unlink(missing_ok=True)
    # The manifest last.
    for name in sorted(new, key=NAME.__eq__):
        (dataset / name).replace(out / name)
    flush(out)
    others = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in new and not is_work_folder(path.name)
    )
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        say(f"{out} also holds {', '.join(others[:SHOWN])}{more}: kept as it was")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
