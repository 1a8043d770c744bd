"""Read the header of a GGUF file: its metadata, and where each tensor is.

Every count in the header is compared with the bytes that are left before anything is made of it.
Arrays of the metadata, such as the tokens, stay in the file until they are asked for. Format:
github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3 in little endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpillm.system.plain_files import open_plain

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
# struct's format of each other type, by its number: UINT8, INT8, UINT16, …, FLOAT64.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
SCALAR_BYTES = {number: struct.calcsize(f"<{form}") for number, form in SCALARS.items()}
# ggml's own limit.
MOST_DIMS = 4
# Arrays of arrays: no writer nests them deeper.
DEEPEST = 2
# The smallest key-value pair: a key of no letters, a type, one byte. The smallest tensor entry.
PAIR_BYTES, ENTRY_BYTES = 13, 24
# Of the data of tensors, where `general.alignment` is missing.
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufEntry:
    """A tensor of the file: its row-major shape, the number of its type, its first byte."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, from byte `offset` of the file on."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What the header says."""

    facts: dict[str, Any]
    """Numbers and texts of the metadata."""
    arrays: dict[str, GgufArray]
    entries: dict[str, GgufEntry]
    nbytes: int
    """Of the whole file."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header at `path`. Raises OSError and ValueError with the first fault."""
    with open_plain(path) as file:
        return _Walk(file).header()


def read_gguf_array(path: Path, array: GgufArray) -> list[Any]:
    """Read an array of numbers or texts. Raises OSError and ValueError."""
    with open_plain(path) as file:
        walk = _Walk(file)
        file.seek(array.offset)
        if array.kind == STRING:
            return [walk.text() for _ in range(array.count)]
        if array.kind == ARRAY:
            raise ValueError("it is an array of arrays")
        form = np.dtype(SCALARS[array.kind]).newbyteorder("<")
        data = file.read(array.count * SCALAR_BYTES[array.kind])
        found: list[Any] = np.frombuffer(data, form).tolist()
        return found


class _Walk:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)

    def header(self) -> GgufHeader:
        if self._file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = self._numbers("<I")
        if version not in VERSIONS:
            raise ValueError(
                f"it is of version {version}; this mpillm reads 2 and 3, little endian"
            )
        tensors, pairs = self._numbers("<QQ")
        self._fits(pairs * PAIR_BYTES + tensors * ENTRY_BYTES, f"{tensors} tensors, {pairs} pairs")
        facts: dict[str, Any] = {}
        arrays: dict[str, GgufArray] = {}
        for _ in range(pairs):
            name, (kind,) = self.text(), self._numbers("<I")
            if name in facts or name in arrays:
                raise ValueError(f"it has {name!r:.80} twice")
            if kind == ARRAY:
                arrays[name] = self._array(0)
            else:
                facts[name] = self._scalar(kind)
        alignment = facts.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= self._size:
            raise ValueError(f"its alignment is {alignment!r}")
        read: list[tuple[str, GgufEntry]] = [self._entry() for _ in range(tensors)]
        start = -(-self._file.tell() // alignment) * alignment
        entries = {name: GgufEntry(e.shape, e.kind, start + e.offset) for name, e in read}
        if len(entries) < tensors:
            raise ValueError("two of its tensors have one name")
        return GgufHeader(facts, arrays, entries, self._size)

    def _entry(self) -> tuple[str, GgufEntry]:
        name, (dims,) = self.text(), self._numbers("<I")
        if dims > MOST_DIMS:
            raise ValueError(f"a tensor has {dims} dims; GGUF has {MOST_DIMS} at most")
        # GGUF counts dims from the innermost.
        shape = self._numbers(f"<{dims}Q")[::-1]
        if math.prod(filter(None, shape)) >= 1 << 60:
            raise ValueError(f"{name!r:.80} has the shape {list(shape)}, too large for any memory")
        kind, offset = self._numbers("<IQ")
        return name, GgufEntry(shape, kind, offset)

    def text(self) -> str:
        """Read a text; bytes that are no UTF-8 become U+FFFD."""
        (count,) = self._numbers("<Q")
        self._fits(count, f"a text of {count} bytes")
        return self._file.read(count).decode("utf-8", "replace")

    def _scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self._numbers(f"<{SCALARS[kind]}")[0]

    def _array(self, depth: int) -> GgufArray:
        """Note where the elements are, and skip them."""
        kind, count = self._numbers("<IQ")
        found = GgufArray(kind, count, self._file.tell())
        if kind in SCALAR_BYTES:
            self._skip(SCALAR_BYTES[kind] * count, f"an array of {count} numbers")
            return found
        if kind not in (STRING, ARRAY) or depth == DEEPEST:
            raise ValueError(f"an array has elements of the type {kind} at depth {depth}")
        # An element of a variable length has 8 bytes at least.
        self._fits(8 * count, f"an array of {count} elements")
        for _ in range(count):
            if kind == ARRAY:
                self._array(depth + 1)
            else:
                (length,) = self._numbers("<Q")
                self._skip(length, f"a text of {length} bytes")
        return found

    def _numbers(self, form: str) -> tuple[int, ...]:
        data = self._file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError("it ends within its header")
        return struct.unpack(form, data)

    def _skip(self, count: int, what: str) -> None:
        self._fits(count, what)
        self._file.seek(count, 1)

    def _fits(self, count: int, what: str) -> None:
        left = self._size - self._file.tell()
        if count > left:
            raise ValueError(f"its header has {what}, and {left} bytes are left")
