"""Prepare a dataset of pairs: check, encode, shuffle, manifest. The same bytes on any number of
ranks.

Records are read twice: once for their count and classes, once to encode them.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console, binary_bytes
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain
from mpillm.tokens import shuffle
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
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_records import (
    DEFAULT_FIELDS,
    Label,
    PairEncoder,
    PairRecord,
    class_names,
    read_records,
)
from mpillm.tokens.pairs.pair_shards import (
    PAIR_KINDS,
    PairFormat,
    file_digest,
    pack,
    write_pair_shard,
)
from mpillm.tokens.sources import SourcePiece, list_pieces, pieces_of_rank
from mpillm.tokens.split import plan_split
from mpillm.tokens.survey import ORDINAL_BITS, Replaced, warn_of_replaced
from mpillm.tokens.tokenizer import Tokenizer, train_bpe
from mpillm.tokens.train_tokenizer import SAMPLE_SALT
from mpillm.tokens.work_folder import WorkFolder

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tokens.prepare import PrepareOptions

# Records that are encoded together, by threads.
BATCH_RECORDS = 256
EVERYTHING = "**/*"
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PairSurvey:
    """What a first reading found: this rank's pieces, and the totals of all ranks."""

    pieces: list[SourcePiece]
    mine: range
    fields: tuple[str, str]
    kind: str
    n_pairs: int
    n_characters: int
    content: str
    classes: tuple[str, ...]

    def records(self) -> "chain[tuple[int, PairRecord]]":
        """Read this rank's records again, each with its ordinal. Raises DataError."""
        return chain.from_iterable(map(self._of_piece, self.mine))

    def _of_piece(self, number: int) -> "Sequence[tuple[int, PairRecord]]":
        found = read_records(self.pieces[number], self.kind, self.fields)
        return [((number << ORDINAL_BITS) + place, each) for place, each in enumerate(found)]


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
    found = _survey(options, out, comm, console)
    prep = _prep(options, found, tokenizer_json)

    def write(work: WorkFolder) -> tuple[Manifest, Describe]:
        text = tokenizer_json or _train(options, found, comm, console)
        tokenizer = Tokenizer.from_json(text, name, options.end_of_text)
        need = f"the {found.n_pairs:,} pairs are there twice while they are prepared"
        describe = partial(describe_failure, work, need)
        return _write(options, found, tokenizer, prep, work, describe, comm, console), describe

    return make_dataset(out, prep, options.overwrite, write, comm, console)


def _survey(
    options: "PrepareOptions", out: Path, comm: "MPI.Intracomm", console: Console
) -> PairSurvey:
    """Read all records once, each on one rank. Every rank calls it."""
    kind = options.task
    default = DEFAULT_FIELDS[kind]
    fields = (options.source_field or default[0], options.target_field or default[1])
    # Among sounds and pictures, a folder's records are what is read.
    glob = "**/*.jsonl" if options.glob == EVERYTHING else options.glob
    pieces = list_pieces(options.sources, glob, out, fields[0], comm, console)
    plain = next((piece.path for piece in pieces if not piece.lines), None)
    if plain is not None:
        raise UsageError(
            f"{plain} holds no JSON records, and --task {kind} makes pairs of them; write a "
            f'record a line, such as {{"{fields[0]}": …, "{fields[1]}": …}}, to a .jsonl file'
        )
    mine = pieces_of_rank(pieces, comm.rank, comm.size)
    empty = PairSurvey(pieces, mine, fields, kind, 0, 0, "", ())
    bytes_replaced, halves_replaced = Replaced(), Replaced()

    def read() -> tuple[int, int, int, set[Label]]:
        count = nbytes = content = 0
        labels: set[Label] = set()
        for ordinal, record in empty.records():
            bytes_replaced.add(record.replaced, ordinal >> ORDINAL_BITS)
            halves_replaced.add(record.halves, ordinal >> ORDINAL_BITS)
            key = xxhash.xxh3_64_intdigest(_identity(record, kind), seed=ordinal)
            count, nbytes = count + 1, nbytes + sum(map(len, _texts_of(record, kind)))
            content = (content + key) % (1 << 64)
            labels |= _labels_of(record, kind)
        return count, nbytes, content, labels

    every = comm.allgather(on_all(comm, read))
    warn_of_replaced(bytes_replaced, halves_replaced, pieces, comm, console)
    labels = set().union(*(each[3] for each in every))
    count, nbytes, content = (sum(each[number] for each in every) for number in range(3))
    if not count:
        raise DataError(
            f"the sources hold no record; give .jsonl files with {' and '.join(fields)}"
        )
    digest = f"{content % (1 << 64):016x}"
    return PairSurvey(pieces, mine, fields, kind, count, nbytes, digest, class_names(labels))


def _identity(record: PairRecord, kind: str) -> bytes:
    """Return what identifies a record's contents: its values, and the hash of a file it names.

    Not the file's size: all pictures may have the same. Raises DataError.
    """
    digest = ""
    if PAIR_KINDS[kind].source in ("frames", "pixels") and isinstance(record.source, str):
        path = record.folder / record.source
        try:
            digest = file_digest(path)
        except (OSError, ValueError) as failure:
            why = explain(failure, path) if isinstance(failure, OSError) else str(failure)
            raise DataError(f"{record.place} names a file that cannot be read: {why}") from failure
    return to_json([record.source, record.target, digest]).encode()


def _labels_of(record: PairRecord, kind: str) -> set[Label]:
    target = PAIR_KINDS[kind].target
    if target == "target":
        return set()
    return set(record.target) if target == "labels" else {record.target}


def _text_of(record: PairRecord, kind: str) -> str:
    """Return the text that a record's target is; "" for a class."""
    return record.target if PAIR_KINDS[kind].target == "target" else ""


def _train(
    options: "PrepareOptions", found: PairSurvey, comm: "MPI.Intracomm", console: Console
) -> str:
    """Train a BPE on rank 0, on the records with the smallest hashes; return its JSON."""
    share = min(1.0, options.tokenizer_bytes / max(1, found.n_characters))
    most = int(share * ((1 << 64) - 1))

    def sample() -> list[tuple[int, int, str]]:
        chosen = []
        for ordinal, record in found.records():
            text = "\n".join(_texts_of(record, found.kind))
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


def _texts_of(record: PairRecord, kind: str) -> list[str]:
    """Return all texts of a record: a tokenizer is trained on them."""
    texts: list[str] = []
    if PAIR_KINDS[kind].source == "source":
        texts += [record.source] if isinstance(record.source, str) else record.source
    if PAIR_KINDS[kind].target == "target":
        texts.append(record.target)
    return texts


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
    }


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
    encoder = PairEncoder(options.task, tokenizer, found.classes, losses)
    encode = partial(_encode, found, encoder, options, path)
    index, text_bytes, own_item = on_all(comm, encode, describe)
    item = _same_item([each for each in comm.allgather(own_item) if each], found)
    total = losses.total(comm)
    if total.share:
        console.warn(f"the tokenizer {tokenizer.name} loses text: {total.describe()}")
    plan = plan_split(index["key"], index["n_tokens"], options.validation, comm)
    if plan.cut:
        console.warn(
            f"{found.n_pairs:,} pairs are too few to hold some out: there is no validation"
        )
    else:
        index["split"] = plan.of(index["key"])
    padding = tokenizer.vocabulary.padding or 0
    target = tokenizer.dtype.str if PAIR_KINDS[options.task].target == "target" else "<i4"
    closed = tokenizer.closes_rows and PAIR_KINDS[options.task].source == "source"
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
    return on_root(comm, lambda: save_manifest(made, tokenizer), describe)


# The dtype of a source, the shape of its rows, and the place of the first such record.
Item = tuple[str, tuple[int, ...], str]


def _encode(
    found: PairSurvey, encoder: PairEncoder, options: "PrepareOptions", path: Path
) -> tuple[Array, Array, Item | None]:
    """Write this rank's pairs, packed, into the file `path`.

    Returns their index, of SPILLED, the bytes of each one's text, and the shape of sources.
    """
    rows, text_bytes = [], []
    item: Item | None = None
    with path.open("wb") as file, ThreadPoolExecutor(max(1, options.workers)) as pool:
        records_left = found.records()
        while batch := list(islice(records_left, BATCH_RECORDS)):
            records = [record for _, record in batch]
            for (ordinal, record), (source, target) in zip(
                batch, encoder.encode(records, pool), strict=True
            ):
                own = source.dtype.str, source.shape[1:], record.place if item is None else ""
                item = item or own
                if own[:2] != item[:2]:
                    raise _unlike(item, (*own[:2], record.place))
                blob = pack(source, target)
                file.write(blob)
                # Of what it says: the split is the same for any tokenizer.
                named = to_json([record.source, record.target]).encode()
                key = xxhash.xxh3_64_intdigest(named, seed=options.seed)
                rows.append((key, ordinal, record.piece.source, 0, len(blob), len(blob)))
                text_bytes.append(len(_text_of(record, found.kind).encode()))
    return np.array(rows, SPILLED), np.array(text_bytes, np.int64), item


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
    rows = []
    for name, split in manifest.splits.items():
        nbytes = sum(shard.nbytes for shard in split.shards)
        sides = (sum(getattr(s, side) for s in split.shards) for side in ("n_source", "n_target"))
        counts = [f"{count:,}" for count in (split.n_docs, *sides)]
        rows.append([name, *counts, binary_bytes(nbytes), f"{len(split.shards):,}"])
    classes = f", {len(manifest.classes):,} classes" if manifest.classes else ""
    title = f"{options.out}: {options.task}, {manifest.vocab_size:,} tokens{classes}"
    head = ["split", "pairs", "source", "target", "bytes", "shards"]
    console.table(title, head, rows)
