"""The index of a checkpoint: every type, name and number is checked before anything else is read.

`index.json` has a digest of itself, so that one wrong bit in a fact or a name is found. An index
of an earlier release has none: its numbers are checked all the same.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from mpillm.errors import CheckpointError
from mpillm.system.json_text import from_json, read_json, to_json
from mpillm.system.messages import why
from mpillm.system.plain_files import is_plain_name
from mpillm.weights.places import INDEX, step_of
from mpillm.weights.slices import Box, run_boxes

# Version 2 adds slices that are boxes, but not runs of elements. Without one, version 1 is written.
FORMAT, VERSION, VERSION_WITH_BOXES = "mpillm.checkpoint", 1, 2
# No tensor has more elements or bytes: 64-bit arithmetic never overflows below it.
LARGEST = 1 << 60
# NumPy's own limit of releases before 2.
MOST_DIMS = 32
REQUIRED = ("format", "version", "facts", "files", "tensors")
# torch's names of the types that NumPy reads, or that are stored as one that it reads.
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "int64": 8,
        "int32": 4,
        "int16": 2,
        "int8": 1,
        "uint8": 1,
        "bool": 1,
        "complex64": 8,
        "complex128": 16,
    }
)
# Keys that earlier releases did not write.
OPTIONAL = ("hashes", "digest")
_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredSlice:
    """Elements of a tensor, stored in `file` from byte `offset` on, with the hash of their bytes.

    `boxes`: the boxes of the tensor that they fill, one after another.
    """

    file: str
    offset: int
    nbytes: int
    boxes: tuple[Box, ...]
    xxh3_128: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the namespace: its torch dtype (`float32`), whole shape and stored slices."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredSlice, ...]


@dataclass(frozen=True)
class Index:
    """The checked contents of `index.json`."""

    facts: dict[str, Any]
    """What the writer recorded; `step` is a number from 0."""
    files: dict[str, int]
    """The bytes of each file next to the index."""
    tensors: dict[str, StoredTensor]
    hashes: dict[str, str] = field(default_factory=dict)
    """xxh3-128 of each small text file; empty in an index of an earlier release."""
    has_digest: bool = False
    """Whether the index was compared with a digest of itself."""


def with_digest(index: Mapping[str, Any]) -> dict[str, Any]:
    """Add the digest of the index, as a reader of the written text will compute it."""
    # Parsed again: what JSON changes, such as tuples and NaN, must not change the digest.
    plain = from_json(to_json(index))
    return {**plain, "digest": _digest(plain)}


def read_index(folder: Path) -> Index:
    """Read and check the index of the checkpoint in `folder`. Raises CheckpointError."""
    path = folder / INDEX
    try:
        value = read_json(path)
    except FileNotFoundError as failure:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: it has no {INDEX}; use another"
        ) from failure
    except (OSError, ValueError) as failure:
        raise CheckpointError(
            f"{path} cannot be read: {why(failure)}; use another checkpoint"
        ) from failure
    found = (value.get("format"), value.get("version")) if isinstance(value, dict) else (None, None)
    if found not in ((FORMAT, VERSION), (FORMAT, VERSION_WITH_BOXES)):
        raise CheckpointError(
            f"{path} is of format {_short(found[0])} version {_short(found[1])}; "
            f"this mpillm reads {FORMAT} {VERSION} and {VERSION_WITH_BOXES}"
        )
    try:
        index = _checked(value)
        named = step_of(folder)
        if named is not None and named != index.facts["step"]:
            raise ValueError(f"its step is {index.facts['step']}, the folder's {named}")
    except (ValueError, RecursionError) as failure:
        raise CheckpointError(f"{path} is damaged: {failure}; use another checkpoint") from failure
    return index


def _checked(value: dict[str, Any]) -> Index:
    """Check the whole index. Raises ValueError with the first fault."""
    digest = value.get("digest")
    if digest is not None and digest != _digest(value):
        raise ValueError("its digest differs from its contents")
    missing = [key for key in REQUIRED if key not in value]
    unknown = [key for key in value if key not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        raise ValueError(f"its keys are wrong: {_short(missing or unknown)}")
    facts, tables = _table(value["facts"], "facts"), _table(value["tensors"], "tensors")
    _number(facts.get("step"), "step")
    files = {
        _plain(name): _number(nbytes, f"the size of {name}")
        for name, nbytes in _table(value["files"], "files").items()
    }
    hashes = {
        _plain(name): _hash(digest, name)
        for name, digest in _table(value.get("hashes", {}), "hashes").items()
    }
    if unlisted := set(hashes) - set(files):
        raise ValueError(f"it has a hash, but no size, of {_short(sorted(unlisted))}")
    tensors = {name: _tensor(name, entry, files) for name, entry in tables.items()}
    return Index(facts, files, tensors, hashes, digest is not None)


def _tensor(name: str, value: Any, files: Mapping[str, int]) -> StoredTensor:
    entry = _table(value, name)
    dtype, shape = str(entry.get("dtype")), _numbers(entry.get("shape"), f"the shape of {name}")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"the type of {name} is {_short(dtype)}, and no type of tensors")
    if len(shape) > MOST_DIMS or math.prod(filter(None, shape)) > LARGEST:
        raise ValueError(f"{name} has the shape {_short(list(shape))}, too large for any memory")
    pieces = entry.get("pieces")
    if not isinstance(pieces, list):
        raise ValueError(f"the pieces of {name} are {_short(pieces)} and not a list")
    read = tuple(_piece(name, piece, shape, ITEM_BYTES[dtype], files) for piece in pieces)
    count = sum(box.numel for piece in read for box in piece.boxes)
    if count != math.prod(shape):
        raise ValueError(
            f"the pieces of {name} have {count:,} of its {math.prod(shape):,} elements"
        )
    if overlap([box for piece in read for box in piece.boxes]):
        raise ValueError(f"pieces of {name} overlap")
    return StoredTensor(dtype, shape, read)


def _piece(
    name: str, value: Any, shape: tuple[int, ...], itemsize: int, files: Mapping[str, int]
) -> StoredSlice:
    """Read an entry of the index: a run (`first`, `count`), or a box (`start`, `size`)."""
    entry = _table(value, f"a piece of {name}")
    file, whole = _plain(entry.get("file")), math.prod(shape)
    offset = _number(entry.get("offset"), f"an offset of {name}")
    nbytes = _number(entry.get("nbytes"), f"the bytes of a piece of {name}")
    if "first" in entry:
        first = _number(entry["first"], f"the first element of a piece of {name}")
        count = _number(entry.get("count"), f"the elements of a piece of {name}")
        if first + count > whole:
            raise ValueError(f"a piece of {name} ends after its {whole:,} elements")
        boxes = tuple(run_boxes(shape, first, count))
    else:
        box = Box(
            _numbers(entry.get("start"), f"the start of a piece of {name}"),
            _numbers(entry.get("size"), f"the size of a piece of {name}"),
        )
        dims = {len(box.start), len(box.size), len(shape)}
        if len(dims) > 1 or any(a + n > m for a, n, m in zip(*box, shape, strict=True)):
            raise ValueError(f"a piece of {name} is outside of its shape {_short(list(shape))}")
        boxes, count = (box,), box.numel
    if nbytes != count * itemsize:
        raise ValueError(f"a piece of {name} has {nbytes:,} bytes for {count:,} elements")
    if file not in files or offset + nbytes > files[file]:
        raise ValueError(f"a piece of {name} ends after {file}, which has {files.get(file, 0):,}")
    return StoredSlice(file, offset, nbytes, boxes, _hash(entry.get("xxh3_128"), name))


def overlap(boxes: Sequence[Box]) -> bool:
    """Return whether two of the boxes of one tensor share an element."""
    filled = [box for box in boxes if box.numel]
    if len(filled) < 2:
        return False
    if not filled[0].start:
        return True
    # A sweep along the dim with most cuts compares few pairs: slices are cut along one or two.
    dims = range(len(filled[0].start))
    dim = max(dims, key=lambda d: len({box.start[d] for box in filled}))
    filled.sort(key=lambda box: box.start[dim])
    for number, box in enumerate(filled):
        end = box.start[dim] + box.size[dim]
        for other in filled[number + 1 :]:
            if other.start[dim] >= end:
                break
            if box.common(other):
                return True
    return False


def _digest(value: Mapping[str, Any]) -> str:
    """Hash the index in one canonical text, without its field `digest`."""
    rest = {key: entry for key, entry in value.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _plain(name: Any) -> str:
    if not is_plain_name(name):
        raise ValueError(f"it names the file {_short(name)}, which is not one of this folder")
    return str(name)


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: {_short(value)} is not an object")
    return value


def _hash(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"the hash of {name} is {_short(value)}")
    return value


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{what} is {_short(value)} and not a number from 0 to 2^60")
    return value


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_short(value)} and not a list")
    return tuple(_number(one, what) for one in value)


def _short(value: Any) -> str:
    return reprlib.repr(value)
