"""Survey the texts: key and measure every document, before anything is decided about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mpillm.comm.waiting import patient_barrier
from mpillm.errors import DataError
from mpillm.system.console import Console
from mpillm.system.messages import one_line
from mpillm.tokens.order import mix
from mpillm.tokens.sources import (
    Document,
    LongText,
    SourcePiece,
    Texts,
    measure,
    pieces_of_rank,
    read_pieces,
)

if TYPE_CHECKING:
    from mpi4py import MPI

Array = np.ndarray[Any, np.dtype[Any]]

# A document's ordinal: the number of its piece, then its number in the piece.
# It is the same on any number of ranks.
ORDINAL_BITS = 32
DOCUMENT = np.dtype([("key", "<u8"), ("ordinal", "<u8"), ("nbytes", "<i8"), ("source", "<u2")])


@dataclass(frozen=True)
class Survey:
    """This rank's pieces and documents, and the totals of all ranks.

    `pieces` lists every piece, `mine` numbers this rank's. `documents` (n,) of DOCUMENT, in the
    order of `mine`: `key` xxh3-64 of the UTF-8 text, `nbytes` its length. `content` identifies the
    set of all documents.
    """

    pieces: list[SourcePiece]
    mine: range
    documents: Array
    n_docs: int
    n_bytes: int
    content: str
    seed: int

    def of_piece(self, number: int) -> Array:
        """Return the documents of one of this rank's pieces."""
        first, last = np.searchsorted(
            self.documents["ordinal"] >> np.uint64(ORDINAL_BITS), [number, number + 1]
        )
        return self.documents[first:last]

    def read(self, numbers: Sequence[int], threads: int) -> Iterator[tuple[Texts, Array]]:
        """Read pieces of this rank again; yield their texts with their rows of `documents`.

        Raises DataError where a file is another than it was. Only reading it shows that of a
        LongText: `unchanged` does.
        """
        pieces = [self.pieces[number] for number in numbers]
        for number, texts in zip(numbers, read_pieces(pieces, threads), strict=True):
            known = self.of_piece(number)
            if len(known) != len(texts.documents) or any(
                isinstance(document, str) and key_of(document.encode(), self.seed) != key
                for document, key in zip(texts.documents, known["key"].tolist(), strict=True)
            ):
                raise _changed(texts.piece)
            yield texts, known

    def unchanged(self, document: LongText, key: int) -> Iterator[str]:
        """Yield the parts of a long text. Raises DataError at its end unless its key is `key`."""
        state = xxhash.xxh3_64(seed=self.seed)
        for part in document:
            state.update(part.encode())
            yield part
        if state.intdigest() != key:
            raise _changed(document.piece)


def _changed(piece: SourcePiece) -> DataError:
    return DataError(
        f"{one_line(piece.path)} changed while it was read; run again when nothing writes to it"
    )


def survey(
    pieces: list[SourcePiece],
    names: tuple[str, ...],
    seed: int,
    threads: int,
    comm: "MPI.Intracomm",
    console: Console,
) -> Survey:
    """Read all pieces once, each on one rank, and key every document.

    Every rank of `comm` calls it. Raises DataError: on all ranks for a source without documents,
    on one rank for a file that cannot be read.
    """
    mine = pieces_of_rank(pieces, comm.rank, comm.size)
    tables = [np.empty(0, DOCUMENT)]
    bytes_replaced, halves_replaced = Replaced(), Replaced()
    total = sum(piece.nbytes for piece in pieces)
    own = sum(pieces[number].nbytes for number in mine)
    with console.progress("reading", total, "bytes") as progress:
        for number, texts in zip(
            mine, read_pieces([pieces[i] for i in mine], threads), strict=True
        ):
            table, replaced = _table(texts.documents, number, texts.piece.source, seed)
            tables.append(table)
            bytes_replaced.add(texts.replaced + replaced, number)
            halves_replaced.add(texts.halves, number)
            progress.advance(texts.piece.nbytes * total / own)
    patient_barrier(comm)
    documents = np.concatenate(tables)
    warn_of_replaced(bytes_replaced, halves_replaced, pieces, comm, console)
    _check_sources(documents, names, comm)
    n_docs, n_bytes = comm.allreduce(len(documents)), comm.allreduce(int(documents["nbytes"].sum()))
    return Survey(pieces, mine, documents, n_docs, n_bytes, _content(documents, comm), seed)


@dataclass
class Replaced:
    """Count the places that U+FFFD replaced, and keep the first piece that has one."""

    count: int = 0
    first: int | None = None

    def add(self, count: int, piece: int) -> None:
        if count:
            self.count += count
            self.first = piece if self.first is None else self.first

    def warn(
        self, text: str, pieces: list[SourcePiece], comm: "MPI.Intracomm", console: Console
    ) -> None:
        """Warn with the count, the encoding and the first file of all ranks, if there is one."""
        count = comm.allreduce(self.count)
        firsts = [first for first in comm.allgather(self.first) if first is not None]
        if firsts:
            piece = pieces[min(firsts)]
            console.warn(
                text.format(
                    count=f"{count:,} place{'s' if count > 1 else ''}",
                    encoding=piece.encoding.upper(),
                    path=one_line(piece.path),
                )
            )


def warn_of_replaced(
    of_bytes: Replaced,
    of_halves: Replaced,
    pieces: list[SourcePiece],
    comm: "MPI.Intracomm",
    console: Console,
) -> None:
    """Warn of all places that U+FFFD replaced. Every rank calls it."""
    of_bytes.warn(
        "{count} aren't {encoding} and were replaced by U+FFFD, first in {path}; "
        "convert such files with iconv to keep their text",
        pieces,
        comm,
        console,
    )
    of_halves.warn(
        "halves of characters in JSON (escapes such as \\ud83d, {count}) became U+FFFD, first "
        "in {path}; the program that wrote the records cut texts within a character",
        pieces,
        comm,
        console,
    )


def _table(documents: list[Document], number: int, source: int, seed: int) -> tuple[Array, int]:
    """Measure the documents of a piece; return also the places replaced in long texts."""
    table = np.empty(len(documents), DOCUMENT)
    measured = [measure(document, seed) for document in documents]
    table["key"] = [key for key, _, _ in measured]
    table["ordinal"] = (number << ORDINAL_BITS) + np.arange(len(documents))
    table["nbytes"] = [nbytes for _, nbytes, _ in measured]
    table["source"] = source
    return table, sum(replaced for _, _, replaced in measured)


def key_of(text: bytes, seed: int) -> int:
    """Hash a text: the key alone decides the document's split, shard and place in it."""
    return xxhash.xxh3_64_intdigest(text, seed=seed)


def _check_sources(documents: Array, names: tuple[str, ...], comm: "MPI.Intracomm") -> None:
    counts, all_counts = (
        np.bincount(documents["source"], minlength=len(names)),
        np.zeros(len(names), np.int64),
    )
    comm.Allreduce(counts.astype(np.int64), all_counts)
    for name, count in zip(names, all_counts.tolist(), strict=True):
        if not count:
            raise DataError(
                f"the source {one_line(name)} is empty: none of its files holds text "
                "(blank and binary ones don't count); give one with text, or another --glob"
            )


def _content(documents: Array, comm: "MPI.Intracomm") -> str:
    """Digest (key, ordinal) of all documents: a sum modulo 2^64, equal for any number of ranks."""
    total = np.zeros(1, np.uint64)
    own = mix(documents["key"] ^ mix(documents["ordinal"])).sum(dtype=np.uint64, keepdims=True)
    comm.Allreduce(own, total)
    return f"{int(total[0]):016x}"
