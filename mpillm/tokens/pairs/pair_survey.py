"""Read all records of pairs once: their format, their count, their classes and their identity."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from mpillm.comm.failure import on_all, on_root
from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.system.json_text import to_json
from mpillm.system.messages import explain
from mpillm.tokens.chat.chat_formats import recognise, words_of
from mpillm.tokens.chat.chat_template import ChatTemplate
from mpillm.tokens.chat.preference_formats import LABELLED, recognise_preference
from mpillm.tokens.pairs.pair_records import (
    DEFAULT_FIELDS,
    Label,
    PairRecord,
    class_names,
    raw_records,
    read_records,
)
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS, file_digest
from mpillm.tokens.sources import SourcePiece, list_pieces, pieces_of_rank, place_of_line
from mpillm.tokens.survey import ORDINAL_BITS, Replaced, warn_of_replaced
from mpillm.tokens.text.records import RecordError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.tokens.prepare import PrepareOptions

EVERYTHING = "**/*"
COLUMNS = "columns"
"""The format of conversations whose columns an option names."""


@dataclass(frozen=True)
class PairSurvey:
    """What a first reading found: this rank's pieces, and the totals of all ranks.

    `form` and `template`: of conversations, their format and what writes them.
    """

    pieces: list[SourcePiece]
    mine: range
    fields: tuple[str, ...]
    kind: str
    form: str = ""
    n_pairs: int = 0
    n_characters: int = 0
    content: str = ""
    classes: tuple[str, ...] = ()
    template: ChatTemplate | None = None

    def records(self) -> "chain[tuple[int, PairRecord]]":
        """Read this rank's records again, each with its ordinal. Raises DataError."""
        return chain.from_iterable(map(self._of_piece, self.mine))

    def _of_piece(self, number: int) -> "Sequence[tuple[int, PairRecord]]":
        found = read_records(self.pieces[number], self.kind, self.fields, self.form)
        return [((number << ORDINAL_BITS) + place, each) for place, each in enumerate(found)]


def survey_pairs(
    options: "PrepareOptions", out: Path, comm: "MPI.Intracomm", console: Console
) -> PairSurvey:
    """Read all records once, each on one rank. Every rank calls it."""
    kind, default = options.task, DEFAULT_FIELDS[options.task]
    fields: tuple[str, ...]
    fields = (options.source_field or default[0], options.target_field or default[1])
    pieces = _pieces(options, fields, out, comm, console)
    form = ""
    if PAIR_KINDS[kind].is_preference:
        fields = ()
        given = options.format or (kind if kind == LABELLED else "")
        form = kind = given or on_root(comm, lambda: _recognised(pieces, True))
    elif PAIR_KINDS[kind].is_chat:
        form = COLUMNS if options.source_field or options.target_field else options.format
        form = form or on_root(comm, lambda: _recognised(pieces))
        fields = fields if form == COLUMNS else ()
    mine = pieces_of_rank(pieces, comm.rank, comm.size)
    empty = PairSurvey(pieces, mine, fields, kind, form)
    bytes_replaced, halves_replaced = Replaced(), Replaced()

    def read() -> tuple[int, int, int, set[Label]]:
        count = nbytes = content = 0
        labels: set[Label] = set()
        for ordinal, record in empty.records():
            bytes_replaced.add(record.replaced, ordinal >> ORDINAL_BITS)
            halves_replaced.add(record.halves, ordinal >> ORDINAL_BITS)
            key = xxhash.xxh3_64_intdigest(_identity(record, kind), seed=ordinal)
            count, nbytes = count + 1, nbytes + sum(map(len, texts_of(record, kind)))
            content = (content + key) % (1 << 64)
            labels |= _labels_of(record, kind)
        return count, nbytes, content, labels

    every = comm.allgather(on_all(comm, read))
    warn_of_replaced(bytes_replaced, halves_replaced, pieces, comm, console)
    labels = set().union(*(each[3] for each in every))
    count, nbytes, content = (sum(each[number] for each in every) for number in range(3))
    if not count:
        raise _no_record(fields)
    if PAIR_KINDS[kind].target == "classes" and not labels:
        name = options.target_field or default[1]
        raise DataError(
            f'no record has a label in "{name}", so there is nothing to learn; '
            "name another by --target-field"
        )
    if kind == LABELLED:
        _check_labels(labels, count)
    classes = () if kind == LABELLED else class_names(labels)
    digest = f"{content % (1 << 64):016x}"
    return replace(empty, n_pairs=count, n_characters=nbytes, content=digest, classes=classes)


def _check_labels(labels: set[Label], count: int) -> None:
    """Raise DataError where the answers of KTO are all desirable, or none."""
    if len(labels) == 1:
        raise DataError(
            f"all {count:,} records have an answer that is {next(iter(labels))}: KTO learns from "
            "both, so add records with the other label"
        )


def _no_record(fields: Sequence[str]) -> DataError:
    named = f" with {' and '.join(fields)}" if fields else ""
    return DataError(f"the sources hold no record; give .jsonl files{named}")


def _pieces(
    options: "PrepareOptions",
    fields: Sequence[str],
    out: Path,
    comm: "MPI.Intracomm",
    console: Console,
) -> list[SourcePiece]:
    """List the pieces of records, or the one of two parallel texts. Raises UsageError."""
    # Among sounds and pictures, a folder's records are what is read.
    glob = "**/*.jsonl" if options.glob == EVERYTHING else options.glob
    pieces = list_pieces(options.sources, glob, out, fields[0], comm, console, tables=True)
    plain = [piece for piece in pieces if not (piece.lines or piece.table)]
    if len(plain) == len(pieces) == 2 and options.task == "seq2seq":
        source, target = plain
        return [replace(source, table="parallel", partner=target.path)]
    if plain:
        parallel = "; two texts, line by line, are pairs, too" if options.task == "seq2seq" else ""
        raise UsageError(
            f"{plain[0].path} holds no JSON records, and --task {options.task} makes pairs of "
            f'them; write a record a line, such as {{"{fields[0]}": …, "{fields[1]}": …}}, to a '
            f".jsonl file{parallel}"
        )
    return pieces


def _recognised(pieces: Sequence[SourcePiece], preferences: bool = False) -> str:
    """Recognise the format of the first record, of `preferences` or of a chat. Raises DataError."""
    for piece in pieces:
        for offset, record, _ in raw_records(piece):
            try:
                return recognise_preference(record) if preferences else recognise(record)
            except RecordError as failure:
                raise DataError(f"{place_of_line(piece, offset)} {failure}") from failure
    raise _no_record(())


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
    if kind == LABELLED:
        return {"desirable" if record.source else "undesirable"}
    if target in ("labels", "classes"):
        return set(record.target)
    return {record.target} if target == "label" else set()


def text_of(record: PairRecord, kind: str) -> str:
    """Return the text that is learnt from a record; "" for a class."""
    if PAIR_KINDS[kind].is_chat:
        return "".join(
            word for each in record.conversations for word in words_of(each, answers=True)
        )
    return record.target if PAIR_KINDS[kind].target == "target" else ""


def texts_of(record: PairRecord, kind: str) -> list[str]:
    """Return all texts of a record: a tokenizer is trained on them."""
    sides = PAIR_KINDS[kind]
    if sides.is_chat:
        return [word for each in record.conversations for word in words_of(each)]
    texts: list[str] = []
    if sides.source == "source":
        texts += [record.source] if isinstance(record.source, str) else record.source
    if sides.target == "target":
        texts.append(record.target)
    return texts
