"""Files that are whole or absent: written to a temporary name, flushed, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpillm.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`.

    On success it is flushed to disk and renamed, on failure removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Fsync a file or a folder: its contents (a folder: its names) then survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make `path` with its parents and prove that it can be written to.

    Raises UsageError when it is a file or not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        # Another node's process of the same number may have removed it first.
        probe.unlink(missing_ok=True)
    except OSError as failure:
        raise UsageError(
            f"cannot write into the folder {path}: {failure.strerror}; "
            "choose a folder that you may write to"
        ) from failure
