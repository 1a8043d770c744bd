"""Encoding: each rank encodes its documents, and keeps the tokens in one file until the shuffle."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpillm.system.console import Progress
from mpillm.tokens.losses import LossCheck
from mpillm.tokens.split import TRAIN, VALIDATION, SplitPlan, cut_place, cut_tail
from mpillm.tokens.survey import Survey
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
    """A document, or the part of it in one split: its text in blocks, and the beginning of its row
    of the index. `characters`: None for a long text, whose blocks are read once and in order.
    """

    blocks: Iterable[str]
    characters: int | None
    row: tuple[int, int, int, int]


def encode_documents(
    survey: Survey,
    tokenizer: Tokenizer,
    path: Path,
    plan: SplitPlan,
    losses: LossCheck,
    threads: int,
    progress: Progress,
) -> EncodedDocuments:
    """Encode this rank's documents into the file `path`, without communication.

    `losses` sees every text with its ids. `progress` counts this rank's bytes. Raises DataError,
    OSError.
    """
    tables = [np.empty(0, SPILLED)]
    with path.open("wb") as file:
        for batch in _batches(_parts(survey, plan, threads)):
            if batch[0].characters is None:
                [part] = batch
                rows = [_encode_blocks(part, tokenizer, losses, file, progress)]
            else:
                texts = ["".join(part.blocks) for part in batch]
                encoded = tokenizer.encode_batch(texts)
                losses.see(texts, encoded)
                sizes = [len(text.encode()) for text in texts]
                for ids in encoded:
                    file.write(np.append(ids, ids.dtype.type(tokenizer.eot_id)).tobytes())
                rows = [
                    (*part.row, nbytes, len(ids) + 1)
                    for part, nbytes, ids in zip(batch, sizes, encoded, strict=True)
                ]
                progress.advance(sum(sizes))
            tables.append(np.array(rows, SPILLED))
    return EncodedDocuments(path, np.concatenate(tables), tokenizer.dtype)


def _encode_blocks(
    part: EncodedPart,
    tokenizer: Tokenizer,
    losses: LossCheck,
    file: BinaryIO,
    progress: Progress,
) -> tuple[int, ...]:
    """Encode a long text block by block; return its row of the index."""
    nbytes = n_tokens = 0

    def counted() -> Iterator[str]:
        nonlocal nbytes
        for block in part.blocks:
            size = len(block.encode())
            nbytes += size
            progress.advance(size)
            yield block

    for text, ids in tokenizer.encode_blocks(counted()):
        losses.see([text], [ids])
        file.write(ids.tobytes())
        n_tokens += len(ids)
    file.write(np.array([tokenizer.eot_id], tokenizer.dtype).tobytes())
    return (*part.row, nbytes, n_tokens + 1)


def _parts(survey: Survey, plan: SplitPlan, threads: int) -> Iterator[EncodedPart]:
    for texts, known in survey.read(survey.mine, threads):
        splits = plan.of(known["key"]).tolist()
        for document, key, ordinal, split in zip(
            texts.documents, known["key"].tolist(), known["ordinal"].tolist(), splits, strict=True
        ):
            row = (key, ordinal, texts.piece.source)
            if isinstance(document, str):
                # Numbered as the splits: the first half is TRAIN, the second VALIDATION.
                parts = cut_tail(document, plan.validation) if plan.cut else ()
                halves = enumerate(parts) if plan.cut else [(split, document)]
                for which, half in halves:
                    if half:
                        yield EncodedPart([half], len(half), (*row, which))
                continue
            blocks = survey.unchanged(document, key)
            if plan.cut:
                head, blocks = split_blocks(blocks, cut_place(document, plan.validation))
                yield EncodedPart(head, None, (*row, TRAIN))
                split = VALIDATION
            yield EncodedPart(blocks, None, (*row, split))


def _batches(parts: Iterator[EncodedPart]) -> Iterator[list[EncodedPart]]:
    batch: list[EncodedPart] = []
    characters = 0
    for part in parts:
        if part.characters is None:
            # Alone, and after all before it.
            if batch:
                yield batch
            yield [part]
            batch, characters = [], 0
            continue
        batch.append(part)
        characters += part.characters
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def split_blocks(blocks: Iterator[str], place: int) -> tuple[Iterator[str], Iterator[str]]:
    """Split a text in blocks at a character. The first half is read to its end, then the second."""
    rest: list[str] = []

    def head() -> Iterator[str]:
        left = place
        while left:
            block = next(blocks)
            rest[:] = [block[left:]]
            yield block[:left]
            left -= len(block[:left])

    def tail() -> Iterator[str]:
        yield from rest
        yield from blocks

    return head(), tail()
