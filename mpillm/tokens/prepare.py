"""Prepare a dataset: survey, tokenizer, encoding, shuffle, manifest.

The same bytes on any number of ranks.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import DataError, UsageError
from mpillm.system.atomic import flush, make_folder, write_text
from mpillm.system.command_line import Argument, Option
from mpillm.system.console import Console, binary_bytes
from mpillm.tokens import shuffle
from mpillm.tokens.encode import EncodedDocuments, encode_documents, split_of
from mpillm.tokens.manifest import NAME, SPLITS, Manifest, Split, tokenizer_facts
from mpillm.tokens.sources import SourcePiece, list_pieces
from mpillm.tokens.survey import Survey, survey
from mpillm.tokens.tokenizer import Tokenizer, check_vocab_size
from mpillm.tokens.train_tokenizer import load_or_make, train_together

if TYPE_CHECKING:
    from mpi4py import MPI

# Where a library call leaves the choice; `mpillm prepare` takes the rank's share of the cores.
DEFAULT_WORKERS = 2
SMALLEST_SHARD_BYTES, LARGEST_SHARD_BYTES = 4 << 10, 2 << 30


@dataclass(frozen=True)
class PrepareOptions:
    """Describe a dataset to prepare. `workers` do not change the dataset."""

    sources: Annotated[
        tuple[str, ...],
        Argument(
            "Text files, folders, .jsonl files (field text), or stdlib: the source of Python's own "
            "library.",
            metavar="SOURCE…",
        ),
    ] = ()
    out: Annotated[Path | None, Option("The folder to make.")] = None
    tokenizer: Annotated[str, Option("bpe (trained on the text), bytes, or a tokenizer.json.")] = (
        "bpe"
    )
    vocab_size: Annotated[int, Option("Tokens of the BPE, specials included.")] = 8192
    validation: Annotated[float, Option("The share of documents held out for validation.")] = 0.05
    glob: Annotated[str, Option("Which files of a folder.")] = "**/*"
    end_of_text: Annotated[
        str | None, Option("The token that ends a document, for a FILE tokenizer.")
    ] = None
    shard_bytes: Annotated[int, Option("Bytes of tokens in a shard, about.")] = 256 << 20
    seed: Annotated[int, Option("Decides the documents' order and split.")] = 0
    workers: Annotated[int, Option("Threads a rank; 0: its share of the cores.")] = 0
    overwrite: Annotated[bool, Option("Replace another dataset in --out.")] = False
    tokenizer_bytes: int = 32 << 20
    """Bytes of text that the BPE is trained on, about."""

    def check(self) -> None:
        """Raise UsageError for a number out of its range."""
        if not 0 <= self.validation < 1:
            raise UsageError(
                "--validation is a fraction of the documents, from 0 to below 1; "
                f"got {self.validation}; try 0.05"
            )
        if not SMALLEST_SHARD_BYTES <= self.shard_bytes <= LARGEST_SHARD_BYTES:
            raise UsageError(
                f"a shard holds {SMALLEST_SHARD_BYTES:,} to {LARGEST_SHARD_BYTES:,} bytes of "
                f"tokens, got {self.shard_bytes:,}; try {256 << 20:,}"
            )
        if self.workers < 0 or self.tokenizer_bytes < 1 or not 0 <= self.seed < 1 << 63:
            raise UsageError(
                "tokenizer bytes are 1 or more, workers and a seed 0 or more, "
                f"got {self.workers}, {self.tokenizer_bytes} and {self.seed}"
            )
        if self.tokenizer == "bpe":
            check_vocab_size(self.vocab_size)


def prepare(options: PrepareOptions, comm: "MPI.Intracomm", console: Console) -> Manifest:
    """Make the dataset `options.out`, or find it already made.

    Every rank of `comm` calls it with equal options. The folder appears under its name when it is
    whole; before that, and after an error, there is none. Wrong options and sources raise
    UsageError or DataError on every rank alike, before any work. A file that one rank cannot read
    (DataError), or a full disk (OSError), raises there alone.
    """
    options.check()
    if options.out is None:
        raise UsageError("prepare writes a folder; name it with --out DIR")
    out = options.out.absolute()
    options = replace(options, workers=options.workers or DEFAULT_WORKERS)

    def check_inputs() -> tuple[list[SourcePiece], str | None, str]:
        _check_out(out)
        loaded = load_or_make(options.tokenizer, options.end_of_text)
        pieces = list_pieces(options.sources, options.glob, out.resolve())
        return (pieces, loaded.to_json(), loaded.name) if loaded else (pieces, None, "bpe")

    pieces, tokenizer_json, name = on_root(comm, check_inputs)
    found = survey(pieces, options.sources, options.seed, options.workers, comm, console)
    prep = _prep(options, found, tokenizer_json)
    made = on_root(comm, lambda: _already(out, prep, options.overwrite))
    if made is not None:
        console.say(f"{options.out} is already prepared from these sources with these options")
        return made
    with _partial_folder(out, comm) as partial:
        if tokenizer_json is None:
            tokenizer_json = train_together(
                found, options.vocab_size, options.tokenizer_bytes, comm, console
            )
        tokenizer = Tokenizer.from_json(tokenizer_json, name, options.end_of_text)
        manifest = _write(options, found, tokenizer, prep, partial, comm, console)
        on_root(comm, lambda: _publish(partial, out))
    manifest = Manifest(out, manifest.tokenizer, manifest.prep, manifest.splits)
    _report(manifest, options, console)
    return manifest


def _check_out(out: Path) -> None:
    """Raise UsageError when `out` holds anything but a dataset: it must not be replaced."""
    if out.exists() and not (out.is_dir() and ((out / NAME).exists() or not any(out.iterdir()))):
        raise UsageError(
            f"{out} exists and is not a prepared dataset; choose another --out, or move it away"
        )
    make_folder(out.parent)


def _prep(options: PrepareOptions, found: Survey, tokenizer_json: str | None) -> dict[str, Any]:
    """Collect all that decides the dataset's bytes."""
    trained = {"vocab_size": options.vocab_size, "tokenizer_bytes": options.tokenizer_bytes}
    return {
        "sources": list(options.sources),
        "glob": options.glob,
        "tokenizer": trained
        if tokenizer_json is None
        else {"sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest()},
        "end_of_text": options.end_of_text,
        "validation": options.validation,
        "shard_bytes": options.shard_bytes,
        "seed": options.seed,
        "n_docs": found.n_docs,
        "n_bytes": found.n_bytes,
        "content": found.content,
    }


def _already(out: Path, prep: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Open the dataset at `out` if `prep` made it; raise UsageError when it's another."""
    if overwrite or not (out / NAME).exists():
        return None
    way_out = "give --overwrite to replace it, or choose another --out"
    try:
        manifest = Manifest.load(out)
        for name, split in manifest.splits.items():
            if split.n_tokens:
                manifest.check_shards(name)
    except DataError as failure:
        raise UsageError(f"{out} exists but is damaged ({failure}); {way_out}") from failure
    differing = [key for key, value in prep.items() if manifest.prep.get(key) != value]
    if differing:
        there = ", ".join(
            f"{key} {manifest.prep.get(key)} there, {prep[key]} now" for key in differing[:3]
        )
        raise UsageError(f"{out} exists and was prepared otherwise ({there}); {way_out}")
    return manifest


@contextmanager
def _partial_folder(out: Path, comm: "MPI.Intracomm") -> Iterator[Path]:
    """Make a new folder next to `out` to write the dataset in; remove it when the block raises."""
    partial = out.with_name(f".{out.name}.partial")

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)

    on_root(comm, make)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    options: PrepareOptions,
    found: Survey,
    tokenizer: Tokenizer,
    prep: dict[str, Any],
    partial: Path,
    comm: "MPI.Intracomm",
    console: Console,
) -> Manifest:
    """Encode, shuffle and write all into `partial`, the manifest last. Every rank calls it."""
    encoded = _encode(options, found, tokenizer, partial, comm, console)
    where = shuffle.plan_shuffle(encoded, options.shard_bytes, comm)
    attributes = {
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_name": tokenizer.name,
        "seed": options.seed,
        "prep_config": json.dumps(prep),
        "sources": json.dumps(options.sources),
    }
    with console.progress("writing", len(where.shards), "shards") as progress:
        shards = shuffle.write_shards(encoded, where, partial, attributes, comm, progress)
    encoded.path.unlink()
    totals = comm.allreduce(
        np.array([encoded.index["nbytes"][encoded.index["split"] == i].sum() for i in (0, 1)])
    )

    def manifest() -> Manifest:
        splits = {
            name: _totals(int(n_bytes), [shard for split, shard in shards if split == name])
            for name, n_bytes in zip(SPLITS, totals, strict=True)
        }
        made = Manifest(partial, tokenizer_facts(tokenizer), prep, splits)
        write_text(partial / "tokenizer.json", tokenizer.to_json())
        made.save()
        return made

    return on_root(comm, manifest)


def _encode(
    options: PrepareOptions,
    found: Survey,
    tokenizer: Tokenizer,
    partial: Path,
    comm: "MPI.Intracomm",
    console: Console,
) -> EncodedDocuments:
    counts = np.zeros(2, np.int64)
    comm.Allreduce(
        np.bincount(split_of(found.documents["key"], options.validation), minlength=2).astype(
            np.int64
        ),
        counts,
    )
    cut = options.validation > 0 and not counts.all()
    if cut:
        console.say(
            f"the hash puts all {found.n_docs:,} documents into one split, so each is cut: its "
            f"last {options.validation:.1%}, from a line's start, is for validation"
        )
    path = partial / f".spill-{comm.rank:05d}"
    own = int(found.documents["nbytes"].sum())
    with console.progress("encoding, rank 0's", own, "bytes") as progress:
        encoded = encode_documents(
            found, tokenizer, path, options.validation, cut, options.seed, options.workers, progress
        )
    patient_barrier(comm)
    return encoded


def _totals(n_bytes: int, shards: list[Any]) -> Split:
    return Split(
        sum(s.n_tokens for s in shards), sum(s.n_docs for s in shards), n_bytes, tuple(shards)
    )


def _publish(partial: Path, out: Path) -> None:
    """Rename the folder to its name; remove an earlier dataset only after that."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    flush(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _report(manifest: Manifest, options: PrepareOptions, console: Console) -> None:
    rows = []
    splits = [*manifest.splits.items(), ("total", None)]
    for name, split in splits:
        parts = list(manifest.splits.values()) if split is None else [split]
        docs, n_bytes, tokens = (
            sum(getattr(p, f) for p in parts) for f in ("n_docs", "n_bytes", "n_tokens")
        )
        shards = sum(len(p.shards) for p in parts)
        ratio = f"{n_bytes / tokens:.2f}" if tokens else "–"
        rows.append([name, f"{docs:,}", binary_bytes(n_bytes), f"{tokens:,}", ratio, f"{shards:,}"])
    title = (
        f"{options.out}: tokenizer {manifest.tokenizer['name']} of {manifest.vocab_size:,} tokens"
    )
    console.table(title, ["split", "documents", "text", "tokens", "bytes/token", "shards"], rows)
