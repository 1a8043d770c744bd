"""Encoding: each rank turns its own documents into tokens and keeps them in one file until their shards are known."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.system.console import Progress
from mpillm.tokens.sources import read_pieces
from mpillm.tokens.splitting import TRAIN, VALIDATION, cut_tail, split_of
from mpillm.tokens.survey import Survey, key_of
from mpillm.tokens.tokenizer import Tokenizer

# Texts are encoded together up to so many characters: enough for all threads, little enough to hold.
BATCH_CHARACTERS = 1 << 20

Array = np.ndarray[Any, np.dtype[Any]]

SPILLED = np.dtype(
    [
        ("key", "<u8"),
        ("ordinal", "<u8"),
        ("source", "<u2"),
        ("split", "u1"),
        ("nbytes", "<i8"),
        ("n_tokens", "<i8"),
    ]
)


@dataclass(frozen=True)
class EncodedDocuments:
    """This rank's encoded documents: `index` (n,) of SPILLED, whose tokens lie in `path` in the same order."""

    path: Path
    index: Array
    dtype: np.dtype[Any]

    @property
    def starts(self) -> Array:
        """Where each document's tokens start in the file, in tokens."""
        counts: Array = self.index["n_tokens"]
        return np.cumsum(counts) - counts


@dataclass(frozen=True)
class EncodedPart:
    """A document, or the half of it that goes to one split, and its line of the index (tokens not counted yet)."""

    text: str
    row: tuple[int, int, int, int, int]


def encode_documents(
    survey: Survey,
    tokenizer: Tokenizer,
    path: Path,
    validation: float,
    cut: bool,
    seed: int,
    threads: int,
    progress: Progress,
) -> EncodedDocuments:
    """Encode this rank's documents into the file `path`. No communication. Raises DataError, OSError.

    `cut`: each document is cut in two, else it goes to one split whole. `progress` counts this rank's bytes.
    """
    tables = [np.empty(0, SPILLED)]
    with path.open("wb") as file:
        for batch in _batches(_parts(survey, validation, cut, seed, threads)):
            encoded = tokenizer.encode_batch([part.text for part in batch])
            for ids in encoded:
                file.write(np.append(ids, ids.dtype.type(tokenizer.eot_id)).tobytes())
            rows = [(*part.row, len(ids) + 1) for part, ids in zip(batch, encoded, strict=True)]
            tables.append(np.array(rows, SPILLED))
            progress.advance(int(tables[-1]["nbytes"].sum()))
    return EncodedDocuments(path, np.concatenate(tables), tokenizer.dtype)


def _parts(
    survey: Survey, validation: float, cut: bool, seed: int, threads: int
) -> Iterator[EncodedPart]:
    pieces = [survey.pieces[number] for number in survey.mine]
    for number, texts in zip(survey.mine, read_pieces(pieces, threads), strict=True):
        known = survey.of_piece(number)
        keys = [key_of(text.encode(), seed) for text in texts.documents]
        if keys != known["key"].tolist():
            raise DataError(
                f"{texts.piece.path} changed while it was being prepared; run again when it rests"
            )
        splits = split_of(known["key"], validation).tolist()
        for text, key, ordinal, split in zip(
            texts.documents, keys, known["ordinal"].tolist(), splits, strict=True
        ):
            halves = enumerate(cut_tail(text, validation)) if cut else [(split, text)]
            for which, half in halves:
                if half:
                    yield EncodedPart(
                        half, (key, ordinal, texts.piece.source, which, len(half.encode()))
                    )


def _batches(parts: Iterator[EncodedPart]) -> Iterator[list[EncodedPart]]:
    batch: list[EncodedPart] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


assert (TRAIN, VALIDATION) == (0, 1)  # the order of cut_tail's halves
