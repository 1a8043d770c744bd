"""Make a dataset under its name: once, by one of several jobs, whole or not at all."""

import errno
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.errors import DataError, UsageError
from mpillm.system.atomic import make_folder, write_text
from mpillm.system.console import Console
from mpillm.system.messages import explain, why
from mpillm.system.plain_files import open_plain
from mpillm.tokens.losses import check_chance
from mpillm.tokens.manifest import NAME, SPLITS, TOKENIZER, Manifest, Shard, Split
from mpillm.tokens.publish import holds_dataset, listed_files, publish
from mpillm.tokens.tokenizer import Tokenizer
from mpillm.tokens.train_tokenizer import load_or_make
from mpillm.tokens.work_folder import (
    WorkFolder,
    alone,
    place_of,
    remove_left_over,
    taken_over,
    work_folder,
)

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tokens.prepare import PrepareOptions

Describe = Callable[[OSError], str]
Kind = TypeVar("Kind", bound=Manifest)
Array = np.ndarray[Any, np.dtype[Any]]


def real_path(out: Path) -> Path:
    """Follow links, so that a dataset is made next to where it will be. Raises UsageError."""
    try:
        return Path(os.path.realpath(out))
    except (OSError, ValueError) as failure:
        raise UsageError(f"--out {str(out)!r}: {why(failure)}; choose another folder") from failure


def check_inputs(
    out: Path, overwrite: bool, tokenizer: str, end_of_text: str | None
) -> tuple[str | None, str]:
    """Check that `out` can be made, and return the JSON of the tokenizer and its name.

    The JSON is None where a BPE is to be trained. Raises UsageError, DataError.
    """
    if holds_dataset(out) and overwrite:
        listed_files(out)
    make_folder(place_of(out))
    loaded = load_or_make(tokenizer, end_of_text)
    if loaded is None:
        return None, tokenizer
    check_chance(loaded)
    return loaded.to_json(), loaded.name


def common_prep(options: "PrepareOptions", tokenizer_json: str | None) -> dict[str, Any]:
    """Collect the options that decide the bytes of datasets of all kinds, in their order."""
    trained = {"vocab_size": options.vocab_size, "tokenizer_bytes": options.tokenizer_bytes}
    return {
        "tokenizer": trained
        if tokenizer_json is None
        else {"sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest()},
        "end_of_text": options.end_of_text,
        "validation": options.validation,
        # A key that is there only when it holds: earlier datasets have none.
        **({"fold": [options.fold, options.folds]} if options.fold else {}),
        "shard_bytes": options.shard_bytes,
        "seed": options.seed,
    }


def describe_failure(work: WorkFolder, need: str, failure: OSError) -> str:
    """Say where there was no space, and in `need` what is needed; or what else failed."""
    folder = work.path.parent
    if failure.errno == errno.ENOENT and not work.path.exists():
        return taken_over(work.owner.out)
    if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return explain(failure, failure.filename or folder)
    return f"{explain(failure, folder)} ({need})"


def splits_of(
    shards: Sequence[tuple[str, Shard]], text_bytes: Array, split: Array, comm: "MPI.Intracomm"
) -> dict[str, Split[Shard]]:
    """Sum up each split: `shards` of all ranks with the split's name.

    `text_bytes`, `split` (n,): of this rank's texts, the bytes and the number of the split. Every
    rank calls it.
    """
    totals = comm.allreduce(np.array([text_bytes[split == number].sum() for number in (0, 1)]))
    return {
        name: Split.of(int(n_bytes), [shard for own, shard in shards if own == name])
        for name, n_bytes in zip(SPLITS, totals, strict=True)
    }


def save_manifest(made: Kind, tokenizer: Tokenizer) -> Kind:
    """Write the tokenizer, then the manifest, which is last."""
    write_text(made.folder / TOKENIZER, tokenizer.to_json())
    made.save()
    return made


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
