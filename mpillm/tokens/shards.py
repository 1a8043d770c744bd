"""A shard of tokens: an immutable HDF5 file of contiguous arrays, format `mpillm.tokens` version 1.

    /tokens      <u2 or <u4  the ids of all documents in order, each ended by the end-of-text token
    /doc_ends    <u8         the end of each document in /tokens (exclusive: the last is n_tokens)
    /doc_source  <u2         the number of the source of each document
    /doc_key     <u8         xxh3-64 of each document's text, seeded
    /block_xxh3  <u8         xxh3-64 of each MiB of /tokens (the last one may be short)

Equal contents give equal bytes: no times, no paths, no rank numbers.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mpillm.errors import DataError
from mpillm.system import hdf5
from mpillm.system.atomic import replacing
from mpillm.tokens.dataset_folder import FORMAT

VERSION = 1
BLOCK_BYTES = 1 << 20
READ_BYTES = 16 << 20

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ShardFile:
    """A file that a manifest lists, of any format."""

    file: str
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ShardInfo(ShardFile):
    """A shard's entry of the manifest: enough to read it without HDF5. Sizes and offsets are bytes.

    `xxh3_128` is the digest of /block_xxh3, `rest_xxh3_128` that of every byte outside /tokens.
    """

    dtype: str
    n_tokens: int
    n_docs: int
    tokens_offset: int
    doc_ends_offset: int
    xxh3_128: str
    rest_xxh3_128: str

    @property
    def tokens_nbytes(self) -> int:
        return self.n_tokens * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Documents:
    """The contents of a shard: `tokens` (n_tokens,) u2 or u4; the others (n_docs,): u8, u2, u8."""

    tokens: Array
    ends: Array
    source: Array
    key: Array


def write_shard(path: Path, documents: Documents, attributes: Mapping[str, Any]) -> ShardInfo:
    """Write the shard whole or not at all. One rank calls it; needs at least one document.

    `attributes` are those of the dataset (vocabulary, split, seed …); the counts are added.
    Raises OSError.
    """
    blocks = hdf5.block_hashes(documents.tokens, BLOCK_BYTES)
    arrays = {
        "tokens": documents.tokens,
        "doc_ends": documents.ends.astype("<u8"),
        "doc_source": documents.source.astype("<u2"),
        "doc_key": documents.key.astype("<u8"),
        "block_xxh3": blocks,
    }
    own = {
        "format": FORMAT,
        "version": VERSION,
        "n_tokens": len(documents.tokens),
        "n_docs": len(documents.ends),
        "block_bytes": BLOCK_BYTES,
        # True from the start: the file gets its name only when it is whole.
        "complete": True,
    }
    with replacing(path) as temporary:
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        places = hdf5.layout(temporary, shapes, {**own, **attributes})
        with temporary.open("r+b", buffering=0) as file:
            for name, array in arrays.items():
                hdf5.write_at(file.fileno(), array, places[name].offset)
        tokens = places["tokens"]
        return ShardInfo(
            path.name,
            temporary.stat().st_size,
            tokens.dtype,
            len(documents.tokens),
            len(documents.ends),
            tokens.offset,
            places["doc_ends"].offset,
            hdf5.digest(blocks),
            rest_digest(temporary, (tokens.offset, tokens.nbytes)),
        )


def rest_digest(file: Path | int, *arrays: tuple[int, int]) -> str:
    """Hash (xxh3-128) a file, or an open one, but for its data: HDF5 structure, attributes, tables.

    `arrays`: the byte offset and the size of each array of data. The digest differs between
    datasets: tables or attributes hold hashes of the data.
    """
    state = xxhash.xxh3_128()
    # A descriptor stays open; only its place in the file is moved.
    with open(file, "rb", closefd=not isinstance(file, int)) as opened:
        place = 0
        for offset, nbytes in (*sorted(arrays), (sys.maxsize, 0)):
            opened.seek(place)
            left = offset - place
            while left > 0 and (chunk := opened.read(min(left, READ_BYTES))):
                state.update(chunk)
                left -= len(chunk)
            place = offset + nbytes
    return state.hexdigest()


def read_structure(path: Path, info: ShardInfo) -> tuple[dict[str, hdf5.Extent], dict[str, Any]]:
    """Read the arrays' extents and the root attributes through HDF5, and check them by `info`.

    Raises DataError: for another kind of file, a missing array, a link, another dtype or shape.
    """
    try:
        places, attributes = hdf5.places(path)
    except OSError as failure:
        raise DataError(
            f"{path} is not a shard of tokens: {failure}; prepare the dataset again"
        ) from failure
    blocks = -(-info.tokens_nbytes // BLOCK_BYTES)
    expected = {
        "tokens": (info.dtype, info.n_tokens),
        "doc_ends": ("<u8", info.n_docs),
        "doc_source": ("<u2", info.n_docs),
        "doc_key": ("<u8", info.n_docs),
        "block_xxh3": ("<u8", blocks),
    }
    for name, (dtype, count) in expected.items():
        found = places.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, (count,)):
            what = "none" if found is None else f"{found.dtype} of shape {found.shape}"
            raise DataError(
                f"{path}: the array {name} should be {dtype} of shape ({count},), found {what}; "
                "prepare the dataset again"
            )
    return places, attributes


def token_blocks(path: Path, info: ShardInfo) -> Iterator[tuple[int, int]]:
    """Yield the number and the xxh3-64 of each block of /tokens in order, up to the file's end."""
    with path.open("rb") as file:
        file.seek(info.tokens_offset)
        left, number = info.tokens_nbytes, 0
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                return
            yield number, xxhash.xxh3_64_intdigest(block)
            left, number = left - len(block), number + 1
