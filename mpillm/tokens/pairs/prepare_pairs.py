"""Prepare a dataset of pairs: check, encode, shuffle, manifest. The same bytes on any number of
ranks.

Records are read twice: once for their count and classes, once to encode them.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import DataError
from mpillm.system.atomic import write_text
from mpillm.system.console import Console, binary_bytes
from mpillm.system.json_text import to_json
from mpillm.tokens import shuffle
from mpillm.tokens.chat.chat_encoder import ChatEncoder
from mpillm.tokens.chat.chat_template import TEMPLATE
from mpillm.tokens.encode import SPILLED, EncodedDocuments
from mpillm.tokens.losses import LossCheck
from mpillm.tokens.make_dataset import (
    Describe,
    check_inputs,
    common_prep,
    describe_failure,
    make_dataset,
    save_manifest,
    splits_of,
)
from mpillm.tokens.manifest import Manifest, tokenizer_facts
from mpillm.tokens.order import mix
from mpillm.tokens.pairs.chat_pairs import chat_facts, preview, template_of
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_records import PairEncoder, PairRecord
from mpillm.tokens.pairs.pair_shards import (
    LEARNT,
    PAIR_KINDS,
    PairFormat,
    pack,
    write_pair_shard,
)
from mpillm.tokens.pairs.pair_survey import PairSurvey, survey_pairs, text_of, texts_of
from mpillm.tokens.pairs.questions import QuestionEncoder
from mpillm.tokens.split import plan_split
from mpillm.tokens.tokenizer import Tokenizer, train_bpe
from mpillm.tokens.train_tokenizer import SAMPLE_SALT
from mpillm.tokens.work_folder import WorkFolder

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tokens.prepare import PrepareOptions

# Records that are encoded together, by threads.
BATCH_RECORDS = 256
Array = np.ndarray[Any, np.dtype[Any]]


def prepare_pairs(
    options: "PrepareOptions", out: Path, comm: "MPI.Intracomm", console: Console
) -> tuple[Manifest, bool]:
    """Make the dataset of pairs `out`, or find it made: the second result is False.

    Every rank of `comm` calls it with equal, checked options. Wrong records raise DataError, with
    file and line, on every rank alike.
    """
    pictures = PAIR_KINDS[options.task].source == "pixels"

    # Every dataset has a tokenizer, as every checkpoint does.
    given = out, options.overwrite, "bytes" if pictures else options.tokenizer, options.end_of_text
    tokenizer_json, name = on_root(comm, lambda: check_inputs(*given))
    found = survey_pairs(options, out, comm, console)
    # Preferences are pairs or have labels: their records show it.
    options = replace(options, task=found.kind)
    if PAIR_KINDS[options.task].is_chat:
        form = found.form
        template, end = on_root(comm, lambda: template_of(options, tokenizer_json, form))
        found, options = replace(found, template=template), replace(options, end_of_text=end)
    prep = _prep(options, found, tokenizer_json)

    def write(work: WorkFolder) -> tuple[Manifest, Describe]:
        text = tokenizer_json or _train(options, found, comm, console)
        tokenizer = Tokenizer.from_json(text, name, options.end_of_text)
        need = f"the {found.n_pairs:,} pairs are there twice while they are prepared"
        describe = partial(describe_failure, work, need)
        return _write(options, found, tokenizer, prep, work, describe, comm, console), describe

    return make_dataset(out, prep, options.overwrite, write, comm, console)


def _train(
    options: "PrepareOptions", found: PairSurvey, comm: "MPI.Intracomm", console: Console
) -> str:
    """Train a BPE on rank 0, on the records with the smallest hashes; return its JSON."""
    share = min(1.0, options.tokenizer_bytes / max(1, found.n_characters))
    most = int(share * ((1 << 64) - 1))

    def sample() -> list[tuple[int, int, str]]:
        chosen = []
        for ordinal, record in found.records():
            text = "\n".join(texts_of(record, found.kind))
            key = np.array([xxhash.xxh3_64_intdigest(text.encode(), seed=options.seed)], np.uint64)
            mixed = int(mix(key ^ SAMPLE_SALT)[0])
            if mixed <= most and text:
                chosen.append((mixed, ordinal, text))
        return chosen

    gathered = comm.gather(on_all(comm, sample))

    def train() -> str:
        assert gathered is not None
        texts = [text for _, _, text in sorted(chain.from_iterable(gathered))]
        console.say(f"training a BPE of {options.vocab_size:,} tokens on {len(texts):,} records")
        return train_bpe(texts, options.vocab_size).to_json()

    return on_root(comm, train)


def _prep(
    options: "PrepareOptions", found: PairSurvey, tokenizer_json: str | None
) -> dict[str, Any]:
    """Collect all that decides the dataset's bytes."""
    return {
        "task": options.task,
        "sources": list(options.sources),
        "glob": options.glob,
        "fields": list(found.fields),
        **common_prep(options, tokenizer_json),
        "n_pairs": found.n_pairs,
        "content": found.content,
        **({"format": found.form} if found.form else {}),
        **rows_facts(options),
        **chat_facts(found.template),
    }


def rows_facts(options: "PrepareOptions") -> dict[str, int]:
    """Return the lengths of the rows of questions; {} for other tasks."""
    answers = PAIR_KINDS[options.task].target == "answer"
    return {"row_tokens": options.row_tokens, "stride": options.stride} if answers else {}


def _write(
    options: "PrepareOptions",
    found: PairSurvey,
    tokenizer: Tokenizer,
    prep: dict[str, Any],
    work: WorkFolder,
    describe: Describe,
    comm: "MPI.Intracomm",
    console: Console,
) -> PairManifest:
    """Encode, shuffle and write all into the work folder, the manifest last."""
    path = work.path / f"pairs-{comm.rank:05d}"
    losses = LossCheck(tokenizer)
    chat = None
    if PAIR_KINDS[options.task].is_chat:
        chat = ChatEncoder(tokenizer, found.template)
        on_root(comm, partial(preview, found, chat, tokenizer, console))
    questions = None
    if PAIR_KINDS[options.task].target == "answer":
        questions = QuestionEncoder(tokenizer, options.row_tokens, options.stride)
    encoder = PairEncoder(options.task, tokenizer, found.classes, losses, chat, questions)
    encode = partial(_encode, found, encoder, options, path)
    index, text_bytes, own_item, learnt = on_all(comm, encode, describe)
    if chat is not None:
        counts = comm.allreduce(np.array(learnt))
        console.say(f"{counts[0]:,} tokens, {counts[1] / max(counts[0], 1):.1%} of them learnt")
    item = _same_item([each for each in comm.allgather(own_item) if each], found)
    total = losses.total(comm)
    if total.share:
        console.warn(f"the tokenizer {tokenizer.name} loses text: {total.describe()}")
    fold = options.fold, options.folds
    plan = plan_split(index["key"], index["n_tokens"], options.validation, comm, fold)
    if plan.cut:
        console.warn(
            f"{found.n_pairs:,} pairs are too few to hold some out: there is no validation"
        )
    else:
        index["split"] = plan.of(index["key"])
    padding = tokenizer.vocabulary.padding or 0
    targets = {
        "target": tokenizer.dtype.str,
        "supervised": "|u1",
        "preferred": "|u1",
        "number": "<f4",
        "answer": "|u1",
    }
    target = targets.get(PAIR_KINDS[options.task].target, "<i4")
    closed = (
        tokenizer.closes_rows
        and not questions
        and PAIR_KINDS[options.task].source == "source"
        and not chat
    )
    form = PairFormat(options.task, item[0], target, item[1], padding, closed, found.classes)
    encoded = EncodedDocuments(path, index, np.dtype("u1"))
    where = shuffle.plan_shuffle(encoded, options.shard_bytes, comm)
    attributes = {
        "kind": options.task,
        "tokenizer_sha256": tokenizer.sha256,
        "seed": options.seed,
        "prep_config": json.dumps(prep),
    }
    with console.progress("writing", len(where.shards), "shards") as progress:
        shards = shuffle.write_shards(
            encoded, where, work.dataset, attributes, comm, progress, describe,
            partial(write_pair_shard, form=form),
        )  # fmt: skip
    splits = splits_of(shards, text_bytes, index["split"], comm)
    made = PairManifest(work.dataset, tokenizer_facts(tokenizer), prep, splits, form)
    if found.template is not None:
        text = found.template.text
        on_root(comm, lambda: write_text(work.dataset / TEMPLATE, text), describe)
    return on_root(comm, lambda: save_manifest(made, tokenizer), describe)


# The dtype of a source, the shape of its rows, and the place of the first such record.
Item = tuple[str, tuple[int, ...], str]


def _encode(
    found: PairSurvey, encoder: PairEncoder, options: "PrepareOptions", path: Path
) -> tuple[Array, Array, Item | None, tuple[int, int]]:
    """Write this rank's pairs, packed, into the file `path`.

    Returns their index, of SPILLED, the bytes of each one's text, and the shape of sources. Of
    conversations it counts the tokens and those that are learnt.
    """
    rows, text_bytes, tokens, learnt = [], [], 0, 0
    item: Item | None = None
    with path.open("wb") as file, ThreadPoolExecutor(max(1, options.workers)) as pool:
        records_left = found.records()
        while batch := list(islice(records_left, BATCH_RECORDS)):
            rows_of = encoder.rows(batch, pool)
            every = (
                (each, pair) for each, pairs in zip(batch, rows_of, strict=True) for pair in pairs
            )
            for (ordinal, record), (source, target) in every:
                own = source.dtype.str, source.shape[1:], record.place if item is None else ""
                item = item or own
                if own[:2] != item[:2]:
                    raise _unlike(item, (*own[:2], record.place))
                blob = pack(source, target)
                file.write(blob)
                # Of what it says: the split is the same for any tokenizer.
                named = to_json(_named(record, found.kind)).encode()
                key = xxhash.xxh3_64_intdigest(named, seed=options.seed)
                rows.append((key, ordinal, record.piece.source, 0, len(blob), len(blob)))
                text_bytes.append(len(text_of(record, found.kind).encode()))
                if found.form:
                    tokens, learnt = tokens + len(source), learnt + int((target & LEARNT).sum())
    return np.array(rows, SPILLED), np.array(text_bytes, np.int64), item, (tokens, learnt)


def _named(record: PairRecord, kind: str) -> Any:
    """Return what decides the split: all questions on a context are in one."""
    answers = PAIR_KINDS[kind].target == "answer"
    return record.source[1] if answers else [record.source, record.target]


def _same_item(items: list[Item], found: PairSurvey) -> Item:
    """Return the shape of all ranks' sources. Raises DataError where two differ."""
    for other in items[1:]:
        if other[:2] != items[0][:2]:
            raise _unlike(items[0], other)
    return items[0]


def _unlike(one: Item, other: Item) -> DataError:
    return DataError(
        f"{other[2]} has a source of the shape {list(other[1])} ({other[0]}), and {one[2]} one of "
        f"{list(one[1])} ({one[0]}); make all pictures alike"
    )


def report_pairs(manifest: Manifest, options: "PrepareOptions", console: Console) -> None:
    """Print how many pairs each split has, and their rows and bytes."""
    assert isinstance(manifest, PairManifest)
    rows, kind = [], manifest.pairs
    # The two sides of a conversation are equally long.
    chats = kind.sides.is_chat
    counted = ["n_source"] if chats else ["n_source", "n_target"]
    for name, split in manifest.splits.items():
        nbytes = sum(shard.nbytes for shard in split.shards)
        sides = (sum(getattr(s, side) for s in split.shards) for side in counted)
        counts = [f"{count:,}" for count in (split.n_docs, *sides)]
        rows.append([name, *counts, binary_bytes(nbytes), f"{len(split.shards):,}"])
    classes = f", {len(manifest.classes):,} classes" if manifest.classes else ""
    title = f"{options.out}: {kind.kind}, {manifest.vocab_size:,} tokens{classes}"
    pairs = "chats" if chats and kind.sides.sides == 1 else "pairs"
    columns = ["tokens"] if chats else ["source", "target"]
    head = ["split", pairs, *columns, "bytes", "shards"]
    console.table(title, head, rows)
