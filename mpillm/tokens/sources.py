"""Sources → pieces → documents.

Pieces are cut in the same way for any number of ranks; each rank reads some of them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import xxhash

from mpillm.comm.failure import on_root
from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.system.messages import explain, one_line
from mpillm.tokens.text.examine import FileFacts, examine
from mpillm.tokens.text.records import DEFAULT_FIELD, RecordError, text_of
from mpillm.tokens.text.source_search import LINK, FoundFile, PassedOver, find_files
from mpillm.tokens.text.text_blocks import (
    BYTE_ORDER_MARK,
    UNITS,
    Lines,
    decode,
    decoded_blocks,
)

if TYPE_CHECKING:
    from mpi4py import MPI

JSONL_PIECE_BYTES = 16 << 20
# A longer text is never in memory as a whole.
LONG_TEXT_BYTES = 16 << 20
# A record is parsed as a whole, in several times its size.
LONGEST_RECORD_BYTES = 2 << 30
# A million pieces: a size beyond that is a hole, or a file system's fault.
LARGEST_FILE_BYTES = 16 << 40
# Pieces that threads read ahead hold at most about this much.
READ_AHEAD_BYTES = 64 << 20
# Files are examined by threads: on a network's file system each open waits.
EXAMINE_THREADS = 16


@dataclass(frozen=True)
class SourcePiece:
    """The unit of reading: the bytes [start, stop) of a file of source number `source`.

    `lines`: a file of records, whose lines that start in the range are documents, each the text in
    `field`; else the file is one document. `table`: the kind of a table, whose records are read by
    tables.py; of two parallel texts `partner` is the file of the targets.
    """

    source: int
    path: str
    start: int
    stop: int
    lines: bool
    encoding: str = "utf-8"
    field: str = DEFAULT_FIELD
    table: str = ""
    partner: str = ""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LongText:
    """A document that is read block by block, each time from its start."""

    piece: SourcePiece

    def blocks(self) -> Iterator[tuple[str, int]]:
        """Yield the text in parts, each with its count of places replaced by U+FFFD.

        Raises DataError.
        """
        first = True
        try:
            with Path(self.piece.path).open("rb") as file:
                for text, replaced in decoded_blocks(file, self.piece.encoding, self.piece.stop):
                    yield text.removeprefix(BYTE_ORDER_MARK) if first else text, replaced
                    first = False
        except OSError as failure:
            raise _unreadable(self.piece, failure) from failure

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self.blocks())


Document = str | LongText


class Texts(NamedTuple):
    """The documents of a piece, and how many places of them U+FFFD replaced.

    `replaced` counts runs of bytes that are no text, `halves` halves of characters in JSON. A
    LongText counts its own.
    """

    piece: SourcePiece
    documents: list[Document]
    replaced: int = 0
    halves: int = 0


def parts_of(document: Document) -> Iterable[str]:
    """Return the text in parts, one for a text in memory."""
    return [document] if isinstance(document, str) else document


def measure(document: Document, seed: int) -> tuple[int, int, int]:
    """Return a document's key, its bytes in UTF-8, and a LongText's count of replaced places."""
    state = xxhash.xxh3_64(seed=seed)
    nbytes = replaced = 0
    blocks = [(document, 0)] if isinstance(document, str) else document.blocks()
    for text, bad in blocks:
        data = text.encode()
        state.update(data)
        nbytes, replaced = nbytes + len(data), replaced + bad
    return state.intdigest(), nbytes, replaced


def list_pieces(
    names: Sequence[str],
    glob: str,
    exclude: Path | None,
    field: str,
    comm: "MPI.Intracomm",
    console: Console,
    tables: bool = False,
) -> list[SourcePiece]:
    """List the pieces of all sources, in an order that only their names decide.

    The ranks share the work of examining files; every rank of `comm` calls it. `exclude`: a folder
    to skip. `tables`: files that hold records in another way than a line are read, too. Says what a
    search passes over. Raises UsageError on every rank alike, for a source that is missing, empty
    or no text.
    """

    def find() -> tuple[list[FoundFile], PassedOver]:
        passed = PassedOver()
        return find_files(names, glob, exclude, passed), passed

    files, passed = on_root(comm, find)
    facts = _examine_together(files, field, tables, comm)
    pieces: list[SourcePiece] = []
    suspects: list[str] = []
    for file, known in zip(files, facts, strict=True):
        _check_file(file, known)
        if known.kind:
            passed.add(known.kind.group, file.path)
        elif not known.nbytes:
            passed.add("empty")
        elif known.suspect:
            suspects.append(file.path)
        pieces += _cut(file, known, field)
    _check_sources(names, files, pieces, passed)
    if passed.counts:
        links = "; name a linked folder as a source to read it" if passed.counts[LINK] else ""
        console.say(f"passed over: {passed.text()}{links}")
    if suspects:
        console.warn(
            f"read as plain text, though it looks like JSON lines: {one_line(suspects[0])}"
            f"{f' and {len(suspects) - 1:,} more' if len(suspects) > 1 else ''}; "
            "rename such a file to .jsonl to read its records"
        )
    if field != DEFAULT_FIELD and not any(piece.lines or piece.table for piece in pieces):
        console.warn(f"--field {field} has no effect: no source has JSON records")
    return pieces


def _examine_together(
    files: list[FoundFile], field: str, tables: bool, comm: "MPI.Intracomm"
) -> list[FileFacts]:
    with ThreadPoolExecutor(EXAMINE_THREADS) as pool:
        mine = files[comm.rank :: comm.size]
        own = list(pool.map(lambda file: examine(file.path, file.named, field, tables), mine))
    shares = comm.allgather(own)
    return [shares[number % comm.size][number // comm.size] for number in range(len(files))]


def _check_file(file: FoundFile, known: FileFacts) -> None:
    if known.failure:
        raise UsageError(
            f"cannot read the source {known.failure}"
            + ("" if file.named else "; or leave it out by --glob")
        )
    if known.nbytes > LARGEST_FILE_BYTES:
        raise UsageError(
            f"{one_line(file.path)} has {known.nbytes:,} bytes, a source may have "
            f"{LARGEST_FILE_BYTES:,}; split it into several files"
        )
    if known.kind and file.named:
        raise UsageError(f"{one_line(file.path)} is {known.kind.name}, not text; {known.remedy}")


def _check_sources(
    names: Sequence[str], files: list[FoundFile], pieces: list[SourcePiece], passed: PassedOver
) -> None:
    """Raise UsageError for a source without a byte of text."""
    full = {piece.source for piece in pieces}
    for number, name in enumerate(names):
        if number not in full:
            named = any(file.named for file in files if file.source == number)
            what = "it has no bytes" if named else f"none of its files is text: {passed.text()}"
            raise UsageError(
                f"the source {one_line(name)} is empty: {what}; "
                "give one with text, or another --glob"
            )


def _cut(file: FoundFile, known: FileFacts, field: str) -> Iterator[SourcePiece]:
    """Cut a file of records into ranges of fixed size; any other is a piece, an empty one none."""
    if known.kind:
        return
    unit = UNITS[known.encoding].itemsize
    step = max(JSONL_PIECE_BYTES - JSONL_PIECE_BYTES % unit, unit)
    if not known.lines:
        step = max(known.nbytes, 1)
    for start in range(0, known.nbytes, step):
        stop = min(start + step, known.nbytes)
        yield SourcePiece(
            file.source, file.path, start, stop, known.lines, known.encoding, field, known.table
        )


def pieces_of_rank(pieces: Sequence[SourcePiece], rank: int, size: int) -> range:
    """Number the pieces that `rank` of `size` reads: neighbours, with about its share of bytes."""
    nbytes = np.array([piece.nbytes for piece in pieces], np.float64)
    # A piece goes to the rank in whose share its middle is.
    middles = np.cumsum(nbytes) - nbytes / 2
    first, last = np.searchsorted(middles, nbytes.sum() * np.array([rank, rank + 1]) / size)
    return range(int(first), int(last))


def read_pieces(pieces: Sequence[SourcePiece], threads: int) -> Iterator[Texts]:
    """Yield the documents of `pieces` in order.

    `threads` files are read ahead: reads of many small files mostly wait.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[tuple[int, Future[Texts]]] = deque()
        nbytes = 0
        for piece in pieces:
            while waiting and (len(waiting) > threads or nbytes + piece.nbytes > READ_AHEAD_BYTES):
                nbytes -= waiting[0][0]
                yield waiting.popleft()[1].result()
            # A long text is read by its user, in blocks.
            size = piece.nbytes if piece.lines or piece.nbytes <= LONG_TEXT_BYTES else 0
            waiting.append((size, pool.submit(read_piece, piece)))
            nbytes += size
        while waiting:
            yield waiting.popleft()[1].result()


def read_piece(piece: SourcePiece) -> Texts:
    """Read a piece. Documents without a visible character are left out. Raises DataError."""
    try:
        if not piece.lines and piece.nbytes > LONG_TEXT_BYTES:
            long = LongText(piece)
            return Texts(piece, [long] if any(text.strip() for text in long) else [])
        with Path(piece.path).open("rb") as file:
            if piece.lines:
                return _read_lines(piece, file)
            data = file.read(piece.stop)
    except OSError as failure:
        raise _unreadable(piece, failure) from failure
    text, replaced = decode(data, piece.encoding)
    text = text.removeprefix(BYTE_ORDER_MARK)
    return Texts(piece, [text] if text.strip() else [], replaced)


def _unreadable(piece: SourcePiece, failure: OSError) -> DataError:
    return DataError(f"cannot read the source {explain(failure, piece.path)}; or leave it out")


def _read_lines(piece: SourcePiece, file: BinaryIO) -> Texts:
    documents: list[Document] = []
    replaced = halves = 0
    for offset, text, bad in lines_of(piece, file):
        try:
            document, half = text_of(text, piece.field)
        except RecordError as failure:
            raise DataError(f"{place_of_line(piece, offset)} {failure}") from failure
        replaced, halves = replaced + bad, halves + half
        if document.strip():
            documents.append(document)
    return Texts(piece, documents, replaced, halves)


def lines_of(piece: SourcePiece, file: BinaryIO) -> Iterator[tuple[int, str, int]]:
    """Yield the lines that start in the piece: a line that began earlier is the last piece's.

    Each with its byte offset, and its count of places replaced by U+FFFD. Raises DataError.
    """
    lines = Lines(file, piece.encoding)
    offset = lines.first_start(piece.start, piece.stop)
    if offset is None:
        return
    file.seek(offset)
    while offset < piece.stop and (line := lines.read(LONGEST_RECORD_BYTES)):
        if len(line) >= LONGEST_RECORD_BYTES:
            raise DataError(
                f"{place_of_line(piece, offset)} is longer than {LONGEST_RECORD_BYTES:,} bytes, "
                "the most of a JSON record; write its text to a file of its own, which is read in "
                "blocks"
            )
        text, bad = decode(line, piece.encoding)
        del line
        following = file.tell()
        yield offset, text.removeprefix(BYTE_ORDER_MARK), bad
        offset = following


def place_of_line(piece: SourcePiece, offset: int) -> str:
    """Name a line: its file, its number and its byte, all from 1 but the byte.

    Of a table, `offset` is the number of the record.
    """
    if piece.table:
        return f"{one_line(piece.path)} record {offset:,}"
    with Path(piece.path).open("rb") as file:
        before = Lines(file, piece.encoding).count_ends(offset)
    return f"{one_line(piece.path)} line {before + 1:,} (byte {offset:,})"
