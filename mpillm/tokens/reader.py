"""Tokens of a split by number: shards opened lazily, read by byte offset, never through HDF5."""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mpillm.errors import DataError
from mpillm.system import hdf5
from mpillm.system.messages import command, explain
from mpillm.tokens.manifest import Manifest, Split, check_shard
from mpillm.tokens.sampler import Sampler
from mpillm.tokens.samples import RowShape
from mpillm.tokens.shards import ShardInfo, rest_digest
from mpillm.tokens.windows import EvaluationWindows

Array = np.ndarray[Any, np.dtype[Any]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


class TokenReader:
    """The tokens of one split as one sequence, numbered from 0.

    Every rank opens its own; none keeps an HDF5 handle.
    """

    def __init__(self, folder: Path, name: str, split: Split[ShardInfo], vocab_size: int) -> None:
        self.folder, self.name, self.split, self.vocab_size = folder, name, split, vocab_size
        shards = split.shards
        self.dtype = np.dtype(shards[0].dtype)
        # Shard i holds the tokens firsts[i] … firsts[i + 1] - 1.
        self.firsts = np.concatenate(
            ([0], np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64))
        )
        self.n_tokens = int(self.firsts[-1])
        # Token t of shard i is at byte bases[i] + t · itemsize, t counted in the whole split.
        self.bases = np.array([shard.tokens_offset for shard in shards], np.int64)
        self.bases -= self.firsts[:-1] * self.dtype.itemsize
        self._descriptors = [-1] * len(shards)
        self._doc_ends: list[Int64s | None] = [None] * len(shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_bytes(self) -> int:
        return self.split.n_bytes

    @property
    def n_docs(self) -> int:
        return self.split.n_docs

    def steps(self, row: RowShape, batch: int, seed: int) -> Sampler:
        """Order the windows of a training run. Raises DataError for a split shorter than one."""
        return Sampler(self, row.tokens - 1, batch, seed, boundaries=row.documents)

    def evaluation(self, row: RowShape, rows: int) -> EvaluationWindows:
        """Cut the split into windows in order, `rows` of them a batch. Raises DataError."""
        return EvaluationWindows(self, row.tokens, rows)

    def describe(self, row: RowShape, samples: int) -> str:
        """Say how much there is, and how often `samples` rows pass over it."""
        passes = samples * (row.tokens - 1) / self.n_tokens
        return f"{self.n_tokens:,} tokens, read {passes:.2f} times"

    def describe_cuts(self, row: RowShape) -> str:
        """Say what is longer than a row; "": nothing, as windows fit."""
        return ""

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for shard, descriptor in enumerate(self._descriptors):
            if descriptor >= 0:
                self._descriptors[shard] = -1
                os.close(descriptor)
        self._doc_ends = [None] * len(self._doc_ends)

    def shards_of(self, positions: Int64s) -> Int64s:
        """Find the shard of each token position in the split, both of shape (n,)."""
        if len(self.firsts) == 2:
            return np.zeros(len(positions), np.int64)
        return np.searchsorted(self.firsts, positions, "right") - 1

    def offsets_of(self, positions: Int64s, shards: Int64s) -> Int64s:
        """Compute the byte offset of each position in the file of its shard."""
        return self.bases[shards] + positions * self.dtype.itemsize

    def descriptors(self, shards: Sequence[int]) -> list[int]:
        """Open the file of each of `shards`, and check it; descriptors last until `close`.

        Raises DataError, also where another dataset is there now.
        """
        if -1 in self._descriptors:
            for shard in set(shards):
                self._descriptor(shard)
        return list(map(self._descriptors.__getitem__, shards))

    def _descriptor(self, shard: int) -> int:
        if self._descriptors[shard] < 0:
            path = self.folder / self.split.shards[shard].file
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as failure:
                hint = (
                    "raise `ulimit -n`"
                    if failure.errno == errno.EMFILE
                    else "copy it back or prepare the dataset again"
                )
                raise DataError(
                    f"cannot open the shard {path}: {failure.strerror}; {hint}"
                ) from failure
            try:
                info = self.split.shards[shard]
                data = {"tokens": (info.tokens_offset, info.tokens_nbytes)}
                check_open_shard(self.folder, self.name, self.split, shard, descriptor, data)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptors[shard] = descriptor
        return self._descriptors[shard]

    def read(self, start: int, out: Array) -> None:
        """Fill `out` (C-contiguous, of `self.dtype`) with the tokens from position `start` on.

        Shards are crossed. Raises DataError when there are fewer, or when a file has shrunk.
        """
        flat = out.reshape(-1)
        if start < 0 or start + len(flat) > self.n_tokens or out.dtype != self.dtype:
            raise DataError(
                f"the {self.name} split has {self.n_tokens:,} tokens of {self.dtype}, "
                f"asked for {len(flat):,} of {out.dtype} from {start:,}; ask for less"
            )
        shard, done = int(np.searchsorted(self.firsts, start, "right")) - 1, 0
        while done < len(flat):
            count = min(len(flat) - done, int(self.firsts[shard + 1]) - start - done)
            offset = int(self.bases[shard]) + (start + done) * self.dtype.itemsize
            try:
                hdf5.read_at(self._descriptor(shard), flat[done : done + count], offset)
            except EOFError as failure:
                path = self.folder / self.split.shards[shard].file
                raise DataError(
                    f"{path} has shrunk while in use: {failure}; copy it again"
                ) from failure
            shard, done = shard + 1, done + count
        self.check_ids(flat, np.array([start], np.int64))

    def check_ids(self, tokens: Array, starts: Int64s) -> None:
        """Check that each id of windows of tokens (n, length) is in the vocabulary.

        `starts` (n,): the position of each window in the split. Raises DataError with the file and
        the byte of the first id beyond. The time of the maximum is within the noise of a read.
        """
        if not tokens.size or int(tokens.max()) < self.vocab_size:
            return
        flat = tokens.reshape(-1)
        place = int(np.argmax(flat >= self.vocab_size))
        window, inner = divmod(place, len(flat) // len(starts))
        position = starts[window : window + 1] + inner
        [shard] = self.shards_of(position).tolist()
        [offset] = self.offsets_of(position, np.array([shard])).tolist()
        path = self.folder / self.split.shards[shard].file
        raise DataError(
            f"{path} is damaged: token {int(position[0]):,} of the {self.name} split (byte "
            f"{offset:,} of the file) is {int(flat[place]):,}, the vocabulary ends at "
            f"{self.vocab_size - 1:,}; `{command(['mpillm', 'prepare', '--verify', self.folder])}` "
            "finds all damage; copy the file again or prepare the dataset again"
        )

    def doc_ends(self, shard: int) -> Int64s:
        """Map the document ends of a shard, counted from its first token: int64 (n_docs,).

        Raises DataError where the tables of the shard are not as they were written.
        """
        known = self._doc_ends[shard]
        if known is None:
            info, descriptor = self.split.shards[shard], self._descriptor(shard)
            try:
                with open(descriptor, "rb", closefd=False) as file:
                    mapped = np.memmap(file, "<u8", "r", info.doc_ends_offset, (info.n_docs,))
            except (OSError, ValueError) as failure:
                raise DataError(
                    f"cannot read the document ends of {self.folder / info.file}: {failure}; "
                    "copy it again"
                ) from failure
            # Viewed as signed: a search for signed numbers in unsigned ones would copy the map as
            # floats.
            known = self._doc_ends[shard] = np.asarray(mapped).view(np.int64)
        return known


def check_open_shard(
    folder: Path,
    name: str,
    split: Split[Any],
    number: int,
    descriptor: int,
    data: Mapping[str, tuple[int, int]],
) -> None:
    """Raise DataError unless an open file is shard `number` of the split, with whole tables.

    `data`: the byte offset and the size of each array that no table describes. Once a shard: some
    20 bytes a document, where its data has a thousand or more.
    """
    info = split.shards[number]
    path = folder / info.file
    try:
        if os.fstat(descriptor).st_size == info.nbytes and info.rest_xxh3_128 == rest_digest(
            descriptor, *data.values()
        ):
            return
    except OSError as failure:
        raise DataError(f"cannot read the shard {explain(failure, path)}") from failure
    # A job that replaces a dataset writes the manifest last.
    if Manifest.load(folder).splits[name] != split:
        raise DataError(
            f"{path} is not the file that the manifest named: another dataset is there now; "
            "start again to read that one, or name another"
        )
    check_shard(path, info)
    raise DataError(
        f"{path} is damaged outside {' and '.join(f'/{each}' for each in data)} (its structure, "
        "attributes or tables); copy the file again or prepare the dataset again"
    )


def open_split(folder: str | Path, split: str = "train") -> TokenReader:
    """Open a split by its manifest alone, checking sizes and offsets of its shards.

    Raises DataError.
    """
    manifest = Manifest.load(folder)
    manifest.check_shards(split)
    return TokenReader(manifest.folder, split, manifest.split(split), manifest.vocab_size)
