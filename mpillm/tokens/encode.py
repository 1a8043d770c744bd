"""Encoding: each rank encodes its documents, and keeps the tokens in one file until the shuffle.

Here, too, a document's split is decided: a pure function of its key.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.system.console import Progress
from mpillm.tokens.order import mix
from mpillm.tokens.sources import read_pieces
from mpillm.tokens.survey import Survey, key_of
from mpillm.tokens.tokenizer import Tokenizer

TRAIN, VALIDATION = 0, 1
# The shard follows from the key itself; the split must not, or validation would fill the first
# shards only.
SPLIT_SALT = np.uint64(0x7E57)
# Characters that are encoded together: enough for all threads, little enough to hold in memory.
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
    """This rank's encoded documents: `index` (n,) of SPILLED; `path` has their tokens in order."""

    path: Path
    index: Array
    dtype: np.dtype[Any]

    @property
    def starts(self) -> Array:
        """The first token of each document in the file."""
        counts: Array = self.index["n_tokens"]
        return np.cumsum(counts) - counts


@dataclass(frozen=True)
class EncodedPart:
    """A document, or the part of it in one split, and its row of the index but for `n_tokens`."""

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
    """Encode this rank's documents into the file `path`, without communication.

    `cut`: each document is cut in two, else it goes to one split whole. `progress` counts this
    rank's bytes. Raises DataError, OSError.
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
                f"{texts.piece.path} changed while it was read; run again when nothing writes to it"
            )
        splits = split_of(known["key"], validation).tolist()
        for text, key, ordinal, split in zip(
            texts.documents, keys, known["ordinal"].tolist(), splits, strict=True
        ):
            # Numbered as the splits: the first half is TRAIN, the second VALIDATION.
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


def split_of(keys: Array, validation: float) -> Array:
    """Decide each key's split by hash, TRAIN or VALIDATION: a fraction `validation` of all keys."""
    largest = np.uint64(min(int(validation * 2.0**64), 2**64 - 1))
    return (mix(keys ^ SPLIT_SALT) < largest).astype(np.uint8)


def cut_tail(text: str, validation: float) -> tuple[str, str]:
    """Cut a text in two, the second part about a fraction `validation` of it.

    The second part begins at the start of a line if there is one.
    """
    target = min(len(text) - 1, max(1, round(len(text) * (1 - validation))))
    after = text.find("\n", target - 1) + 1
    if not 0 < after < len(text):
        after = text.rfind("\n", 0, target) + 1
    place = after if 0 < after < len(text) else max(0, target)
    return text[:place], text[place:]
