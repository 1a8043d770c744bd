"""Survey the texts: key and measure every document, before anything is decided about them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mpillm.comm.waiting import patient_barrier
from mpillm.errors import DataError
from mpillm.system.console import Console
from mpillm.tokens.order import mix
from mpillm.tokens.sources import SourcePiece, pieces_of_rank, read_pieces

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

    def of_piece(self, number: int) -> Array:
        """Return the documents of one of this rank's pieces."""
        first, last = np.searchsorted(
            self.documents["ordinal"] >> np.uint64(ORDINAL_BITS), [number, number + 1]
        )
        return self.documents[first:last]


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
    tables, replaced, first_bad = [np.empty(0, DOCUMENT)], 0, len(pieces)
    total = sum(piece.nbytes for piece in pieces)
    own = sum(pieces[number].nbytes for number in mine)
    with console.progress("reading", total, "bytes") as progress:
        for number, texts in zip(
            mine, read_pieces([pieces[i] for i in mine], threads), strict=True
        ):
            tables.append(_table(texts.documents, number, texts.piece.source, seed))
            if texts.replaced:
                replaced, first_bad = replaced + texts.replaced, min(first_bad, number)
            progress.advance(texts.piece.nbytes * total / own)
    patient_barrier(comm)
    documents = np.concatenate(tables)
    replaced, first_bad = comm.allreduce(replaced), min(comm.allgather(first_bad))
    if replaced:
        console.warn(
            f"{replaced:,} places aren't UTF-8 and were replaced by U+FFFD, first in "
            f"{pieces[first_bad].path}; convert such files with iconv to keep their text"
        )
    _check_sources(documents, names, comm)
    n_docs, n_bytes = comm.allreduce(len(documents)), comm.allreduce(int(documents["nbytes"].sum()))
    return Survey(pieces, mine, documents, n_docs, n_bytes, _content(documents, comm))


def _table(texts: list[str], number: int, source: int, seed: int) -> Array:
    table = np.empty(len(texts), DOCUMENT)
    data = [text.encode() for text in texts]
    table["key"] = [key_of(item, seed) for item in data]
    table["ordinal"] = (number << ORDINAL_BITS) + np.arange(len(texts))
    table["nbytes"] = [len(item) for item in data]
    table["source"] = source
    return table


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
                f"the source {name} is empty: none of its files holds text "
                "(blank and binary ones don't count); give one with text, or another --glob"
            )


def _content(documents: Array, comm: "MPI.Intracomm") -> str:
    """Digest (key, ordinal) of all documents: a sum modulo 2^64, equal for any number of ranks."""
    total = np.zeros(1, np.uint64)
    own = mix(documents["key"] ^ mix(documents["ordinal"])).sum(dtype=np.uint64, keepdims=True)
    comm.Allreduce(own, total)
    return f"{int(total[0]):016x}"
