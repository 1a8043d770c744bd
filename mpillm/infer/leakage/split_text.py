"""The text of a split as one sequence of token ids in blocks, with the document of each token.

Tokens of text are in documents; of pairs both sides of a pair are one document here. A special
token, such as an end of text, ends a passage: what is searched never crosses it.

Shapes: T tokens of a block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from mpillm.errors import UsageError
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.pairs.pair_manifest import PairManifest
from mpillm.tokens.pairs.pair_reader import PairReader, open_of
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS
from mpillm.tokens.reader import TokenReader
from mpillm.tokens.tokenizer import Tokenizer

Int64s = np.ndarray[Any, np.dtype[np.int64]]
# In place of the id of a special token.
BREAK = -1
# 8 MiB of ids: NumPy's cost of a call is small, and a few copies take little memory.
BLOCK_TOKENS = 1 << 20
# A block of pairs has whole pairs; some hundred tokens each are usual.
BLOCK_PAIRS = 1 << 12


class TextBlock(NamedTuple):
    """A part of a split: ids (T,), BREAK where a passage ends, and the document of each token."""

    ids_T: Int64s
    documents_T: Int64s


class SplitText:
    """A split whose text is read block by block. Every rank opens its own."""

    def __init__(self, manifest: Manifest, split: str, tokenizer: Tokenizer) -> None:
        """Open the split. Raises UsageError for pictures and sounds, DataError for its files."""
        self._sides = _token_sides(manifest)
        self.manifest, self.name = manifest, split
        known = tokenizer.vocabulary
        self._special = np.array(sorted({known.end_of_text, *known.special.values()}))
        self._reader = open_of(manifest, split)
        shards = manifest.split(split).shards
        self._firsts = np.cumsum([0, *(shard.n_docs for shard in shards)])
        self.documents = int(self._firsts[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    @property
    def blocks(self) -> int:
        """The number of blocks, which depends on the data alone."""
        if isinstance(self._reader, TokenReader):
            return -(-self._reader.n_tokens // BLOCK_TOKENS)
        return -(-self.documents // BLOCK_PAIRS)

    def read(self, number: int, overlap: int = 0) -> TextBlock:
        """Read block `number`, and of text the first `overlap` tokens of the next ones.

        Raises DataError.
        """
        reader = self._reader
        if isinstance(reader, PairReader):
            first = number * BLOCK_PAIRS
            return self._read_pairs(reader, range(first, min(first + BLOCK_PAIRS, self.documents)))
        start = number * BLOCK_TOKENS
        raw = np.empty(min(BLOCK_TOKENS + overlap, reader.n_tokens - start), reader.dtype)
        reader.read(start, raw)
        positions = start + np.arange(len(raw), dtype=np.int64)
        return TextBlock(self._broken(raw), self._documents_of(reader, positions))

    def whole(self) -> TextBlock:
        """Read all blocks as one: for a split that fits into memory. Raises DataError."""
        parts = [self.read(number) for number in range(self.blocks)]
        return TextBlock(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def place_of(self, document: int) -> tuple[str, int]:
        """Return the shard that has a document, and its number there, both counted from 0."""
        shard = int(np.searchsorted(self._firsts, document, "right")) - 1
        file = self.manifest.split(self.name).shards[shard].file
        return str(file), document - int(self._firsts[shard])

    def _documents_of(self, reader: TokenReader, positions: Int64s) -> Int64s:
        shards = reader.shards_of(positions)
        found = np.empty(len(positions), np.int64)
        for shard in np.unique(shards).tolist():
            own = shards == shard
            ends = reader.doc_ends(shard)
            inner = np.searchsorted(ends, positions[own] - reader.firsts[shard], "right")
            found[own] = inner + self._firsts[shard]
        return found

    def _read_pairs(self, reader: PairReader, numbers: Sequence[int]) -> TextBlock:
        end, ids, lengths = np.array([BREAK]), [], []
        for number in numbers:
            sides = [self._broken(side) for side in reader.sides(number)[: self._sides]]
            ids += [part for side in sides for part in (side, end)]
            lengths.append(sum(len(side) + 1 for side in sides))
        documents_T = np.repeat(np.array(numbers, np.int64), lengths)
        return TextBlock(np.concatenate(ids), documents_T)

    def _broken(self, raw: Any) -> Int64s:
        ids_T: Int64s = raw.astype(np.int64)
        ids_T[np.isin(ids_T, self._special)] = BREAK
        return ids_T


def _token_sides(manifest: Manifest) -> int:
    """Return how many sides of a pair are tokens: 1 or 2; 1 for text."""
    if not isinstance(manifest, PairManifest):
        return 1
    kind = PAIR_KINDS[manifest.pairs.kind]
    if kind.source != "source":
        raise UsageError(
            f"the data {manifest.folder} holds {kind.source} of the task {manifest.pairs.kind}, "
            "and passages are found by their tokens; name data of texts"
        )
    return 1 + (kind.target == "target")
