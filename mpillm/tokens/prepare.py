"""Prepare a dataset: survey, tokenizer, encoding, shuffle, manifest.

The same bytes on any number of ranks.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, Option, check_options
from mpillm.system.console import Console, binary_bytes
from mpillm.tasks.task_catalog import DEFAULT as DEFAULT_TASK
from mpillm.tasks.task_catalog import TASKS
from mpillm.tokens import shuffle
from mpillm.tokens.chat.chat_formats import FORMATS, check_format
from mpillm.tokens.chat.preference_formats import COLUMNS as PREFERENCES
from mpillm.tokens.dataset_folder import FOLD
from mpillm.tokens.encode import EncodedDocuments, encode_documents
from mpillm.tokens.losses import LossCheck, check_losses
from mpillm.tokens.make_dataset import (
    Describe,
    check_inputs,
    common_prep,
    describe_failure,
    make_dataset,
    real_path,
    save_manifest,
    splits_of,
)
from mpillm.tokens.manifest import (
    Manifest,
    tokenizer_facts,
)
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS
from mpillm.tokens.shards import write_shard
from mpillm.tokens.sources import list_pieces
from mpillm.tokens.split import plan_split
from mpillm.tokens.survey import Survey, survey
from mpillm.tokens.text.records import DEFAULT_FIELD, check_field
from mpillm.tokens.text.text_cut import LONGEST_PART
from mpillm.tokens.tokenizer import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, Tokenizer
from mpillm.tokens.train_tokenizer import train_together
from mpillm.tokens.work_folder import WorkFolder

if TYPE_CHECKING:
    from mpi4py import MPI

# Where a library call leaves the choice; `mpillm prepare` takes the rank's share of the cores.
DEFAULT_WORKERS = 2
MOST_WORKERS = 1024
# Tasks whose data has the name of another one.
OTHER_KINDS = MappingProxyType(
    {
        "dpo": "preferences: prepare them by --task preference",
        "grpo": "prompts with an answer: prepare them by --task chat",
    }
)
SMALLEST_SHARD_BYTES, LARGEST_SHARD_BYTES = 4 << 10, 2 << 30
# Rank 0 gathers the sample, and MPI counts its bytes by int32.
LARGEST_SAMPLE_BYTES = 1 << 30
USUAL_SHARE, MOST_FOLDS = 0.05, 1000


@dataclass(frozen=True)
class PrepareOptions:
    """Describe a dataset to prepare. `workers` do not change the dataset."""

    sources: Annotated[
        tuple[str, ...],
        Argument(
            "Text files, folders, .jsonl files, or stdlib: the source of Python's own library.",
            metavar="SOURCE…",
        ),
    ] = ()
    out: Annotated[Path | None, Option("The folder to make.")] = None
    tokenizer: Annotated[str, Option("bpe (trained on the text), bytes, or a tokenizer.json.")] = (
        "bpe"
    )
    vocab_size: Annotated[
        int,
        Option(
            "Tokens of the BPE, its 256 bytes and specials included.",
            minimum=SMALLEST_VOCABULARY,
            maximum=LARGEST_VOCABULARY,
        ),
    ] = 8192
    lossy: Annotated[
        bool, Option("Prepare even where the tokenizer loses text, and keep a note of it.")
    ] = False
    validation: Annotated[
        float, Option("The share of documents held out for validation.", minimum=0, maximum=1)
    ] = USUAL_SHARE
    glob: Annotated[str, Option("Which files of a folder; ** is any folders.")] = "**/*"
    field: Annotated[
        str, Option("The field of JSON records that holds the text, dots for nesting.")
    ] = DEFAULT_FIELD
    end_of_text: Annotated[
        str | None, Option("The token that ends a document, for a FILE tokenizer.")
    ] = None
    shard_bytes: Annotated[
        int,
        Option(
            "Bytes of tokens in a shard, about.",
            minimum=SMALLEST_SHARD_BYTES,
            maximum=LARGEST_SHARD_BYTES,
        ),
    ] = 256 << 20
    seed: Annotated[int, Option("Decides the documents' order and split.", minimum=0)] = 0
    workers: Annotated[
        int,
        Option("Threads a rank; 0: its share of the cores.", minimum=0, maximum=MOST_WORKERS),
    ] = 0
    overwrite: Annotated[bool, Option("Replace the files of another dataset in --out.")] = False
    folds: Annotated[
        int,
        Option(
            "Make so many datasets, OUT/fold-1 …, for `train --folds`: each document is for "
            "validation in one of them; 0: one dataset.",
            minimum=0,
            maximum=MOST_FOLDS,
        ),
    ] = 0
    fold: int = 0
    """The fold of this dataset, from 1; 0: its validation is a share."""
    tokenizer_bytes: int = 32 << 20
    """Bytes of text that the BPE is trained on, about."""
    task: Annotated[
        str,
        Option(
            "The task to learn: of text (causal-lm, masked-lm, span-corruption), or of pairs: "
            f"{', '.join(PAIR_KINDS)}."
        ),
    ] = DEFAULT_TASK
    format: Annotated[
        str, Option(f"The format of conversations ({', '.join(FORMATS)}); empty: recognised.")
    ] = ""
    chat_template: Annotated[
        Path | None, Option("A file of the chat template, in place of the tokenizer's.")
    ] = None
    source_field: Annotated[str, Option("The field of a pair's source; empty: the task's.")] = ""
    target_field: Annotated[str, Option("The field of a pair's target; empty: the task's.")] = ""

    row_tokens: Annotated[
        int,
        Option("Tokens of a row of question-answering, the question included.", minimum=8),
    ] = 384
    stride: Annotated[
        int,
        Option("Tokens by which the rows of a long context overlap.", minimum=0),
    ] = 128

    def check(self) -> None:
        """Raise UsageError for a number out of its range."""
        check_options(self)
        check_field(self.field)
        self._check_task()
        self._check_folds()
        if self.validation == 1:
            raise UsageError(
                "--validation 1 leaves no document to train on; take a share below it, such as 0.05"
            )
        if self.end_of_text is not None and self.tokenizer in ("bpe", "bytes"):
            raise UsageError(
                f"--end-of-text names a token of a FILE tokenizer; {self.tokenizer} has its own: "
                "leave it out, or give --tokenizer a tokenizer.json"
            )
        if not 1 <= self.tokenizer_bytes <= LARGEST_SAMPLE_BYTES:
            raise UsageError(
                f"a BPE is trained on 1 to {LARGEST_SAMPLE_BYTES:,} bytes, got "
                f"{self.tokenizer_bytes:,}; try {32 << 20:,}"
            )

    def _check_folds(self) -> None:
        if self.folds == 1:
            raise UsageError("--folds 1 would hold out everything; take 2 at least, such as 5")
        if self.folds and self.validation != USUAL_SHARE:
            raise UsageError(
                f"--folds {self.folds} holds out 1 of {self.folds} parts each time, and "
                "--validation a share; leave one of them out"
            )

    def _check_task(self) -> None:
        check_format(self.format)
        sides = PAIR_KINDS.get(self.task)
        if not (sides and sides.is_chat) and (self.format or self.chat_template):
            option = "--format" if self.format else "--chat-template"
            raise UsageError(
                f"{option} is of conversations, and --task {self.task} has none; leave it out, or "
                "give --task chat or preference"
            )
        if sides and sides.is_preference:
            self._check_preferences()
        if self.task in PAIR_KINDS:
            if self.field != DEFAULT_FIELD:
                raise UsageError(
                    f"--field names a field of text, and --task {self.task} makes pairs; name "
                    "theirs by --source-field and --target-field"
                )
        elif self.task not in TASKS:
            known = ", ".join(dict.fromkeys([*TASKS, *PAIR_KINDS]))
            raise UsageError(f"--task {self.task!r} is unknown; tasks: {known}")
        elif self.task in OTHER_KINDS:
            raise UsageError(f"the task {self.task} learns from {OTHER_KINDS[self.task]}")
        elif self.source_field or self.target_field:
            raise UsageError(
                f"--source-field and --target-field are of pairs, and --task {self.task} reads "
                "text; name its field by --field"
            )

    def _check_preferences(self) -> None:
        """Raise UsageError for options that preferences do not have."""
        if self.source_field or self.target_field:
            raise UsageError(
                f"--source-field and --target-field name two columns, and --task {self.task} reads "
                "a prompt and its answers by the names of its formats; rename the columns"
            )
        if self.format not in ("", *PREFERENCES):
            raise UsageError(
                f"--format {self.format} is of --task chat; formats of --task {self.task}: "
                f"{', '.join(PREFERENCES)}"
            )


def prepare(options: PrepareOptions, comm: "MPI.Intracomm", console: Console) -> Manifest:
    """Make the dataset `options.out`, or find it already made.

    Every rank of `comm` calls it with equal options. The folder appears under its name when it is
    whole; before that, and after an error, there is none. Of several jobs that prepare one folder
    at once, one does it and the others find it made. Wrong options and sources, and full disks,
    raise UsageError or DataError on every rank alike. A file that one rank cannot read (DataError)
    may raise there alone.
    """
    options.check()
    if options.out is None:
        raise UsageError("prepare writes a folder; name it with --out DIR")
    out = real_path(options.out)
    options = replace(options, workers=options.workers or DEFAULT_WORKERS)
    make, report = _prepare_text, _report
    if options.task in PAIR_KINDS:
        # Here: chat templates load jinja2, which texts do not need.
        from mpillm.tokens.pairs.prepare_pairs import prepare_pairs, report_pairs

        make, report = prepare_pairs, report_pairs
    made, new = make(options, out, comm, console)
    if new:
        report(made, options, console)
    else:
        console.say(f"{options.out} is already prepared from these sources with these options")
    return made


def prepare_folds(options: PrepareOptions, comm: "MPI.Intracomm", console: Console) -> None:
    """Make the datasets `options.out`/fold-1 … of `options.folds` folds, or find them made.

    Every rank calls it: see `prepare`.
    """
    options.check()
    if options.out is None:
        raise UsageError("prepare writes folders; name the one around them with --out DIR")
    for fold in range(1, options.folds + 1):
        out = options.out / FOLD.format(fold)
        prepare(replace(options, out=out, fold=fold), comm, console)


def _prepare_text(
    options: PrepareOptions, out: Path, comm: "MPI.Intracomm", console: Console
) -> tuple[Manifest, bool]:
    given = out, options.overwrite, options.tokenizer, options.end_of_text
    tokenizer_json, name = on_root(comm, lambda: check_inputs(*given))
    pieces = list_pieces(options.sources, options.glob, out, options.field, comm, console)
    found = survey(pieces, options.sources, options.seed, options.workers, comm, console)
    prep = _prep(options, found, tokenizer_json)
    write = partial(_make, options, found, (tokenizer_json, name), prep, comm, console)
    return make_dataset(out, prep, options.overwrite, write, comm, console)


def _make(
    options: PrepareOptions,
    found: Survey,
    given: tuple[str | None, str],
    prep: dict[str, Any],
    comm: "MPI.Intracomm",
    console: Console,
    work: WorkFolder,
) -> tuple[Manifest, Describe]:
    """Make the dataset in the work folder; `given`: the tokenizer's JSON, if any, and name."""
    text, name = given
    if text is None:
        text = train_together(found, options.vocab_size, options.tokenizer_bytes, comm, console)
    tokenizer = Tokenizer.from_json(text, name, options.end_of_text)
    made = _write(options, found, tokenizer, prep, work, comm, console)
    return made, _describe(found, tokenizer, work)


def _describe(found: Survey, tokenizer: Tokenizer, work: WorkFolder) -> Describe:
    # No token is shorter than a byte, and the tokens are there twice for a while.
    most = 2 * (found.n_bytes + found.n_docs) * tokenizer.dtype.itemsize
    need = (
        f"to prepare {binary_bytes(found.n_bytes)} of text takes up to {binary_bytes(most)} there"
    )
    return partial(describe_failure, work, need)


def _prep(options: PrepareOptions, found: Survey, tokenizer_json: str | None) -> dict[str, Any]:
    """Collect all that decides the dataset's bytes."""
    return {
        "sources": list(options.sources),
        "glob": options.glob,
        # Left out where it is the default: datasets of earlier versions have none.
        **({} if options.field == DEFAULT_FIELD else {"field": options.field}),
        **common_prep(options, tokenizer_json),
        "n_docs": found.n_docs,
        "n_bytes": found.n_bytes,
        "content": found.content,
        # A key that is there only when it holds: earlier datasets have none.
        **({"lossy": True} if options.lossy else {}),
    }


def _write(
    options: PrepareOptions,
    found: Survey,
    tokenizer: Tokenizer,
    prep: dict[str, Any],
    work: WorkFolder,
    comm: "MPI.Intracomm",
    console: Console,
) -> Manifest:
    """Encode, shuffle and write all into the work folder, the manifest last.

    Every rank calls it. Raises DataError.
    """
    describe = _describe(found, tokenizer, work)
    encoded = _encode(options, found, tokenizer, work, comm, console)
    _say_cuts(tokenizer, comm, console)
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
        shards = shuffle.write_shards(
            encoded, where, work.dataset, attributes, comm, progress, describe, write_shard
        )
    splits = splits_of(shards, encoded.index["nbytes"], encoded.index["split"], comm)
    made = Manifest(work.dataset, tokenizer_facts(tokenizer), prep, splits)
    return on_root(comm, lambda: save_manifest(made, tokenizer), describe)


def _encode(
    options: PrepareOptions,
    found: Survey,
    tokenizer: Tokenizer,
    work: WorkFolder,
    comm: "MPI.Intracomm",
    console: Console,
) -> EncodedDocuments:
    """Encode this rank's documents into a file of the work folder. Raises DataError on all ranks
    where the tokenizer loses text.
    """
    keys, nbytes = (found.documents[name] for name in ("key", "nbytes"))
    fold = options.fold, options.folds
    plan = plan_split(keys, nbytes, options.validation, comm, fold)
    if plan.cut:
        console.say(
            f"no split of the {found.n_docs:,} documents is near {options.validation:.3g}, so each "
            f"is cut: its last {options.validation:.3%}, from a line's start, is for validation"
        )
    losses = LossCheck(tokenizer)
    own = int(found.documents["nbytes"].sum())
    with console.progress("encoding, rank 0's", own, "bytes") as progress:
        encode = partial(
            encode_documents,
            found,
            tokenizer,
            work.path / f"tokens-{comm.rank:05d}",
            plan,
            losses,
            options.workers,
            progress,
        )
        encoded = on_all(comm, encode, _describe(found, tokenizer, work))
    total = losses.total(comm)
    if total.share and options.lossy:
        console.warn(f"the tokenizer {tokenizer.name} loses text: {total.describe()}")
    elif total.share:
        check_losses(total, tokenizer.name)
    return encoded


def _say_cuts(tokenizer: Tokenizer, comm: "MPI.Intracomm", console: Console) -> None:
    """Warn where texts were cut for the tokenizer at places that may change their ids."""
    cuts = comm.allreduce(tokenizer.cutter.n_forced)
    if cuts:
        console.warn(
            f"long texts were cut for the tokenizer, at {cuts:,} places and after at "
            f"most {LONGEST_PART:,} characters; ids there may differ from those of the whole text"
        )


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
    held_out = manifest.splits["validation"].n_bytes
    total = sum(split.n_bytes for split in manifest.splits.values())
    if options.validation:
        console.say(
            f"validation: {100 * held_out / max(total, 1):.3g}% of the bytes "
            f"(asked: {100 * options.validation:.3g}%)"
        )
