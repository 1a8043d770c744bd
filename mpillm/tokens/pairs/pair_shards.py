"""A shard of pairs: an immutable HDF5 file of contiguous arrays, format `mpillm.pairs` version 1.

    /source       the sources of all pairs in order: token ids, frames of sound, or pictures
    /source_ends  <u8  the end of each pair's source in /source (exclusive)
    /target       the targets in order: token ids <u2 or <u4, numbers of classes <i4, numbers
                  <f4, answers as JSON in <u1, or, of chats, <u1: 1 for each token of the source
                  that is learnt, and, of preferences, 2 more for each token of a rejected
                  answer's conversation
    /target_ends  <u8  the end of each pair's target in /target

A source of sound has a row of /source for each frame, a picture is one row. Pairs are shuffled by
the hash of their contents. Equal contents give equal bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mpillm.errors import DataError
from mpillm.system import hdf5
from mpillm.system.atomic import replacing
from mpillm.system.plain_files import open_plain
from mpillm.tokens.dataset_folder import PAIR_FORMAT
from mpillm.tokens.shards import READ_BYTES, VERSION, Documents, ShardFile, rest_digest

Array = np.ndarray[Any, np.dtype[Any]]


# The bits of a token of conversations: it is learnt; its answer is rejected.
LEARNT, REJECTED = 1, 2


class PairKind(NamedTuple):
    """What the two sides of a pair are.

    `source`: tokens (`source`), `frames` or `pixels`. `target`: tokens (`target`), a class
    (`label`), any set of classes (`classes`), a number (`number`), a class for each token
    (`labels`), the place of an answer as JSON (`answer`), or 1 for each token that is learnt
    (`supervised`). Of preferences (`preferred`), 2 more for each token of a rejected answer and its
    prompt. `sides`: the conversations of a pair, which follow each other.
    """

    source: str
    target: str
    sides: int = 1

    @property
    def is_chat(self) -> bool:
        """Whether a pair is made of conversations: its source and target are of the same tokens."""
        return self.target == "supervised" or self.is_preference

    @property
    def is_preference(self) -> bool:
        """Whether answers are chosen or rejected."""
        return self.target == "preferred"


PAIR_KINDS: Mapping[str, PairKind] = MappingProxyType(
    {
        "chat": PairKind("source", "supervised"),
        "preference": PairKind("source", "preferred", 2),
        "kto": PairKind("source", "preferred"),
        "seq2seq": PairKind("source", "target"),
        "sequence-classification": PairKind("source", "label"),
        "multi-label-classification": PairKind("source", "classes"),
        "question-answering": PairKind("source", "answer"),
        "regression": PairKind("source", "number"),
        "token-classification": PairKind("source", "labels"),
        "image-classification": PairKind("pixels", "label"),
        "ctc": PairKind("frames", "target"),
        "speech-to-text": PairKind("frames", "target"),
    }
)


@dataclass(frozen=True)
class PairFormat:
    """The arrays of a dataset of pairs, the same in all of its shards.

    `item`: the shape of a row of /source, () for tokens. `padding`: the id after short sources.
    `closed`: sources end with a token, such as [SEP], which stays where one is cut.
    """

    kind: str
    source_dtype: str
    target_dtype: str
    item: tuple[int, ...] = ()
    padding: int = 0
    closed: bool = False
    classes: tuple[str, ...] = ()

    @property
    def sides(self) -> PairKind:
        return PAIR_KINDS[self.kind]

    @property
    def row_bytes(self) -> int:
        """The bytes of a row of /source."""
        return int(np.prod(self.item, dtype=np.int64)) * np.dtype(self.source_dtype).itemsize


@dataclass(frozen=True)
class PairShard(ShardFile):
    """A shard's entry of the manifest. `n_tokens` counts the rows of both sides, `n_docs` pairs.

    `xxh3_128` is the digest of the whole file, `rest_xxh3_128` that of every byte outside /source
    and /target.
    """

    n_tokens: int
    n_docs: int
    n_source: int
    n_target: int
    source_offset: int
    source_ends_offset: int
    target_offset: int
    target_ends_offset: int
    xxh3_128: str
    rest_xxh3_128: str

    def arrays(self, form: PairFormat) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Return the dtype, the shape and the byte offset of each array."""
        return {
            "source": (form.source_dtype, (self.n_source, *form.item), self.source_offset),
            "source_ends": ("<u8", (self.n_docs,), self.source_ends_offset),
            "target": (form.target_dtype, (self.n_target,), self.target_offset),
            "target_ends": ("<u8", (self.n_docs,), self.target_ends_offset),
        }

    def data(self, form: PairFormat) -> dict[str, tuple[int, int]]:
        """Return the byte offset and the size of the arrays that no table describes."""
        target = self.n_target * np.dtype(form.target_dtype).itemsize
        return {
            "source": (self.source_offset, self.n_source * form.row_bytes),
            "target": (self.target_offset, target),
        }


def pack(source: Array, target: Array) -> bytes:
    """Write a pair as bytes, for the shuffle: the bytes of the source, then both sides."""
    return source.nbytes.to_bytes(8, "little") + source.tobytes() + target.tobytes()


def write_pair_shard(
    path: Path, documents: Documents, attributes: Mapping[str, Any], form: PairFormat
) -> PairShard:
    """Write a shard of packed pairs, whole or not at all. Raises OSError."""
    sources, targets, counts = [], [], []
    begin = 0
    for end in documents.ends.tolist():
        blob = documents.tokens[begin:end]
        middle = 8 + int.from_bytes(blob[:8].tobytes(), "little")
        sources.append(blob[8:middle])
        targets.append(blob[middle:])
        counts.append((middle - 8) // form.row_bytes)
        begin = end
    target = np.concatenate(targets).view(form.target_dtype)
    source = np.concatenate(sources).view(form.source_dtype).reshape(-1, *form.item)
    itemsize = np.dtype(form.target_dtype).itemsize
    arrays = {
        "source": source,
        "source_ends": np.cumsum(counts).astype("<u8"),
        "target": target,
        "target_ends": np.cumsum([len(each) // itemsize for each in targets]).astype("<u8"),
    }
    # In an attribute, so that the rest of the file differs between datasets, too.
    hashes = {f"{name}_xxh3_128": hdf5.digest(arrays[name]) for name in ("source", "target")}
    own = {"format": PAIR_FORMAT, "version": VERSION, "n_pairs": len(counts), "complete": True}
    with replacing(path) as temporary:
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        places = hdf5.layout(temporary, shapes, {**own, **hashes, **attributes})
        with temporary.open("r+b", buffering=0) as file:
            for name, array in arrays.items():
                if array.size:
                    hdf5.write_at(file.fileno(), np.ascontiguousarray(array), places[name].offset)
        data = [(places[name].offset, arrays[name].nbytes) for name in ("source", "target")]
        offsets = {f"{name}_offset": place.offset for name, place in places.items()}
        rows, n_target = len(source), len(target)
        nbytes, digest = temporary.stat().st_size, file_digest(temporary)
        return PairShard(
            path.name, nbytes, rows + n_target, len(counts), rows, n_target, **offsets,
            xxh3_128=digest, rest_xxh3_128=rest_digest(temporary, *data),
        )  # fmt: skip


def file_digest(path: Path) -> str:
    """Hash a whole plain file by xxh3-128. Raises OSError."""
    state = xxhash.xxh3_128()
    with open_plain(path) as file:
        while chunk := file.read(READ_BYTES):
            state.update(chunk)
    return state.hexdigest()


def check_pair_shard(path: Path, shard: PairShard, again: str) -> None:
    """Raise DataError unless the file's bytes are those that were written; `again`: the remedy."""
    if file_digest(path) != shard.xxh3_128:
        raise DataError(f"{path} is damaged: its hash is not that of the manifest; {again}")


def ends_in_order(ends: Array, total: int) -> bool:
    """Return whether a table of ends ascends to `total`."""
    return bool(len(ends) and int(ends[-1]) == total and (ends[1:] >= ends[:-1]).all())


def runs_of(numbers: Array) -> Iterator[tuple[int, Array]]:
    """Yield each distinct number with the places where it is."""
    for number in np.unique(numbers).tolist():
        yield number, np.flatnonzero(numbers == number)
