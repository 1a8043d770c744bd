"""Make a dataset under its name: once, by one of several jobs, whole or not at all."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.comm.failure import on_root
from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.system.messages import why
from mpillm.system.plain_files import open_plain
from mpillm.tokens.manifest import NAME, Manifest
from mpillm.tokens.publish import listed_files, publish
from mpillm.tokens.work_folder import WorkFolder, alone, remove_left_over, work_folder

if TYPE_CHECKING:
    from mpi4py import MPI

Describe = Callable[[OSError], str]


def real_path(out: Path) -> Path:
    """Follow links, so that a dataset is made next to where it will be. Raises UsageError."""
    try:
        return Path(os.path.realpath(out))
    except (OSError, ValueError) as failure:
        raise UsageError(f"--out {str(out)!r}: {why(failure)}; choose another folder") from failure


def make_dataset(
    out: Path,
    prep: Mapping[str, Any],
    overwrite: bool,
    write: Callable[[WorkFolder], tuple[Manifest, Describe]],
    comm: "MPI.Intracomm",
    console: Console,
) -> tuple[Manifest, bool]:
    """Make the dataset `out`, or find it made with the same `prep`: the second result is False.

    Every rank calls it. `write` writes the dataset into the work folder on all ranks, its manifest
    last. It returns how an OSError is worded. Raises UsageError where another dataset is there.
    """
    made = on_root(comm, lambda: _already(out, prep, overwrite))
    if made is not None:
        # A job may have been killed after it gave the dataset its name.
        on_root(comm, lambda: remove_left_over(out, console.say))
        return made, False
    with work_folder(out, prep, comm, console) as work:
        # Another job may have finished since, or while this one waited for it.
        made, stamp = on_root(
            comm, lambda: (_already(out, prep, overwrite, work.waited), _stamp(out))
        )
        if made is not None:
            return made, False
        written, describe = write(work)

        def finish() -> None:
            with alone(work, out, console.say):
                # Another job may have published while this one was suspended, or where no job sees
                # the others' folders, as on a file system that is late.
                if _stamp(out) != stamp and _made_meanwhile(out, prep, overwrite):
                    return
                if not publish(work.dataset, out, overwrite, console.say):
                    _already(out, prep, overwrite=False)

        on_root(comm, finish, describe)
        return replace(written, folder=out), True


def _already(
    out: Path, prep: Mapping[str, Any], overwrite: bool, waited: bool = False
) -> Manifest | None:
    """Open the dataset at `out` if `prep` made it; raise UsageError when it's another.

    None where there is none, and with `overwrite`, unless the job that this one `waited` for has
    made it just now.
    """
    if overwrite and waited:
        try:
            return _already(out, prep, overwrite=False)
        except UsageError:
            return None
    if overwrite or not (out / NAME).exists():
        return None
    way_out = "give --overwrite to replace it, or choose another --out"
    try:
        listed_files(out)
    except UsageError as failure:
        raise UsageError(f"{out} exists but is damaged: {failure}") from failure
    try:
        manifest = Manifest.load(out)
        for name, split in manifest.splits.items():
            if split.n_tokens:
                manifest.check_shards(name)
    except DataError as failure:
        raise UsageError(f"{out} exists but is damaged ({failure}); {way_out}") from failure
    keys = {**prep, **manifest.prep}
    differing = [key for key in keys if manifest.prep.get(key) != prep.get(key)]
    if differing:
        there = ", ".join(
            f"{key} {manifest.prep.get(key)} there, {prep.get(key)} now" for key in differing[:3]
        )
        raise UsageError(f"{out} exists and was prepared otherwise ({there}); {way_out}")
    return manifest


def _made_meanwhile(out: Path, prep: Mapping[str, Any], overwrite: bool) -> Manifest | None:
    """Open what another job has published at `out`; raise UsageError where `prep` is another."""
    if overwrite:
        try:
            Manifest.load(out)
        except DataError:
            # Its job was killed.
            return None
    return _already(out, prep, overwrite=False)


def _stamp(out: Path) -> tuple[int, int]:
    """Return what changes whenever a dataset is published at `out`."""
    try:
        # Opened, not looked up: a client of NFS asks its server then.
        with open_plain(out / NAME) as file:
            seen = os.fstat(file.fileno())
    except OSError:
        return 0, 0
    return seen.st_ino, seen.st_mtime_ns
