"""Check the header of a GGUF file before a reader trusts it.

Every count in the header is compared with the bytes that are left: the reader of the package gguf
would follow a count of 2^60 through memory. Format: github.com/ggml-org/ggml, docs/gguf.md,
versions 2 and 3 in little endian.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from mpillm.system.plain_files import open_plain

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
# Bytes of each other type, by its number: UINT8, INT8, UINT16, …, FLOAT64.
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# ggml's own limit.
MOST_DIMS = 4
# Arrays of arrays: no writer nests them deeper.
DEEPEST = 2
# The smallest key-value pair: a key of no letters, a type, one byte. The smallest tensor entry.
PAIR_BYTES, ENTRY_BYTES = 13, 24


def check_gguf_header(path: Path) -> None:
    """Walk through the header at `path`. Raises OSError and ValueError with the first fault."""
    with open_plain(path) as file:
        _Walk(file).header()


class _Walk:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)

    def header(self) -> None:
        if self._file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = self._numbers("<I")
        if version not in VERSIONS:
            raise ValueError(
                f"it is of version {version}; this mpillm reads 2 and 3, little endian"
            )
        tensors, pairs = self._numbers("<QQ")
        self._fits(pairs * PAIR_BYTES + tensors * ENTRY_BYTES, f"{tensors} tensors, {pairs} pairs")
        for _ in range(pairs):
            self._string()
            self._value(self._numbers("<I")[0], 0)
        for _ in range(tensors):
            self._string()
            (dims,) = self._numbers("<I")
            if dims > MOST_DIMS:
                raise ValueError(f"a tensor has {dims} dims; GGUF has {MOST_DIMS} at most")
            self._skip(8 * dims + 4 + 8, "the entry of a tensor")

    def _value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self._string()
        elif kind == ARRAY:
            if depth == DEEPEST:
                raise ValueError("arrays are nested too deeply")
            inner, count = self._numbers("<IQ")
            if inner in SCALAR_BYTES:
                self._skip(SCALAR_BYTES[inner] * count, f"an array of {count} numbers")
                return
            # An element of a variable length has 8 bytes at least.
            self._fits(8 * count, f"an array of {count} elements")
            for _ in range(count):
                self._value(inner, depth + 1)
        elif kind in SCALAR_BYTES:
            self._skip(SCALAR_BYTES[kind], "a number")
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    def _string(self) -> None:
        (count,) = self._numbers("<Q")
        self._skip(count, f"a text of {count} bytes")

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
