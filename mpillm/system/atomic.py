"""Files that are whole or absent: written to a temporary name, flushed, then renamed.

Devices, pipes and sockets have no such name: they are written in place. A link stays a link, and
its target is replaced. `check_outputs` tries the files that a verb will write at its end.
"""

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpillm.errors import CheckpointError, UsageError
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain

# A name may have 255 bytes, and a letter up to 4: the temporary name of the longest still fits.
_NAME_LETTERS = 40


@contextmanager
def replacing(path: Path, plain: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success its contents become those of `path`.

    A plain file is flushed to disk and renamed, on failure the temporary file is removed. What is
    no plain file (/dev/stdout, a pipe) gets the bytes in place; with `plain`, for files that no
    user names, it is an OSError: nobody reads such a pipe. The block must write the path that it is
    given, and may reopen it.
    """
    if is_special(path):
        if plain:
            raise OSError(errno.ENXIO, "it is no plain file", str(path))
        with tempfile.TemporaryDirectory(prefix="mpillm-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            # Appended: /dev/stdout may be a file that already holds output.
            with temporary.open("rb") as source, open_special(path) as target:
                shutil.copyfileobj(source, target)
        return
    target_path = Path(os.path.realpath(path))
    temporary = temporary_path(target_path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(target_path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(target_path.parent)


def is_special(path: Path) -> bool:
    """Return whether `path` names something that a rename would destroy: a device, a pipe, a
    socket, or an open file of a process (/dev/stdout, /proc/self/fd/1).
    """
    whole = str(Path.cwd() / path)
    if whole.startswith(("/dev/", "/proc/")) and not whole.startswith("/dev/shm/"):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def open_special(path: Path) -> Iterator[Any]:
    """Open an existing device or pipe for writing; nothing is created or cut."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), "wb") as file:
        yield file


def temporary_path(path: Path) -> Path:
    """Name a hidden file next to `path`; nobody can predict the name and put a link there."""
    return path.with_name(f".{path.name[:_NAME_LETTERS]}.{secrets.token_hex(8)}.tmp")


def write_text(path: Path, text: str, plain: bool = False) -> None:
    """Replace the file by `text` in UTF-8; bytes of names that are no UTF-8 stay as they are.

    `plain`: see replacing.
    """
    with replacing(path, plain) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any, plain: bool = False) -> None:
    write_text(path, to_json(value, indent=1) + "\n", plain)


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
        probe = temporary_path(path / "writable")
        try:
            probe.touch(exist_ok=False)
        finally:
            # Also where a signal ends the verb just now.
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as failure:
        # A path with a NUL byte is a ValueError.
        raise UsageError(
            f"cannot write into the folder {path}: {getattr(failure, 'strerror', failure)}; "
            "choose a folder that you may write to"
        ) from failure


def refuse_taken(out: Path, option: str = "--out") -> None:
    """Raise UsageError where something has the name of a new file or folder."""
    try:
        taken = out.exists() or out.is_symlink()
    except OSError as failure:
        raise UsageError(explain(failure, out)) from failure
    if taken:
        raise UsageError(f"{out} is there already; name another {option}, or move it away")


def give_name(work: Path, out: Path, option: str = "--out") -> None:
    """Rename a whole file or folder to `out`. Raises UsageError where something has the name,
    CheckpointError where it cannot be renamed.
    """
    # rename(2) would replace a file or an empty folder.
    refuse_taken(out, option)
    try:
        work.rename(out)
        flush(out.parent)
    except OSError as failure:
        raise CheckpointError(f"cannot write {out}: {explain(failure, out)}") from failure


def check_outputs(named: Mapping[str, Path | None], make_folders: bool = True) -> list[Path]:
    """Return the files of `named`, option → file or None; with `make_folders` make their folders.

    Raises UsageError, with the option, for a folder, a file of two options, and a place that cannot
    be written to. A device or a pipe is not opened: a pipe waits for its reader.
    """
    found: dict[Path, str] = {}
    for option, path in named.items():
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file in it")
        if is_special(path):
            if not os.access(path, os.W_OK):
                why = "you may not write there" if path.exists() else "it is not there"
                raise UsageError(f"{option}: cannot write {path}: {why}; name another file")
            continue
        whole = Path(os.path.realpath(path))
        if whole in found:
            raise UsageError(f"{found[whole]} and {option} both name {path}; name two files")
        found[whole] = option
        if not (make_folders or whole.parent.is_dir()):
            raise UsageError(
                f"{option}: cannot write {path}: {whole.parent} is no folder; make it, or name "
                "another file"
            )
        try:
            make_folder(whole.parent)
        except UsageError as failure:
            raise UsageError(f"{option} {path}: {failure}") from failure
    return [path for path in named.values() if path is not None]


def check_new_file(out: Path | None, option: str) -> None:
    """Raise UsageError where `option` names a file that exists, or that cannot be written."""
    if out is not None:
        refuse_taken(out, option)
        check_outputs({option: out})


def write_new_file(out: Path | None, text: str, option: str) -> None:
    """Write the file that `option` names, whole or not at all; None: nothing is asked for.

    Raises UsageError where something has its name by now.
    """
    if out is None:
        return
    work = temporary_path(out)
    try:
        work.write_text(text, encoding="utf-8")
        give_name(work, out, option)
    finally:
        work.unlink(missing_ok=True)
