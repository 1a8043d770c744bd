"""Encoding: each rank encodes its documents, and keeps the tokens in one file until the shuffle."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.system.console import Progress
from mpillm.tokens.losses import LossCheck
from mpillm.tokens.sources import read_pieces
from mpillm.tokens.split import SplitPlan, cut_tail
from mpillm.tokens.survey import Survey, key_of
from mpillm.tokens.tokenizer import Tokenizer

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
    plan: SplitPlan,
    losses: LossCheck,
    seed: int,
    threads: int,
    progress: Progress,
) -> EncodedDocuments:
    """Encode this rank's documents into the file `path`, without communication.

    `losses` sees every text with its ids. `progress` counts this rank's bytes. Raises DataError,
    OSError.
    """
    tables = [np.empty(0, SPILLED)]
    with path.open("wb") as file:
        for batch in _batches(_parts(survey, plan, seed, threads)):
            texts = [part.text for part in batch]
            encoded = tokenizer.encode_batch(texts)
            losses.see(texts, encoded)
            for ids in encoded:
                file.write(np.append(ids, ids.dtype.type(tokenizer.eot_id)).tobytes())
            rows = [(*part.row, len(ids) + 1) for part, ids in zip(batch, encoded, strict=True)]
            tables.append(np.array(rows, SPILLED))
            progress.advance(int(tables[-1]["nbytes"].sum()))
    return EncodedDocuments(path, np.concatenate(tables), tokenizer.dtype)


def _parts(survey: Survey, plan: SplitPlan, seed: int, threads: int) -> Iterator[EncodedPart]:
    pieces = [survey.pieces[number] for number in survey.mine]
    for number, texts in zip(survey.mine, read_pieces(pieces, threads), strict=True):
        known = survey.of_piece(number)
        keys = [key_of(text.encode(), seed) for text in texts.documents]
        if keys != known["key"].tolist():
            raise DataError(
                f"{texts.piece.path} changed while it was read; run again when nothing writes to it"
            )
        splits = plan.of(known["key"]).tolist()
        for text, key, ordinal, split in zip(
            texts.documents, keys, known["ordinal"].tolist(), splits, strict=True
        ):
            # Numbered as the splits: the first half is TRAIN, the second VALIDATION.
            halves = enumerate(cut_tail(text, plan.validation)) if plan.cut else [(split, text)]
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
