"""Decode text by blocks: in bounded memory, and as the whole would be decoded."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

REPLACEMENT = "\ufffd"
BYTE_ORDER_MARK = "\ufeff"
BLOCK_BYTES = 1 << 20
# A line mostly begins soon: the search for its start reads a little first.
FIRST_BLOCK_BYTES = 1 << 13

# The unit of each encoding, in which pieces and lines are cut.
UNITS: dict[str, np.dtype[Any]] = {
    "utf-8": np.dtype("u1"),
    "utf-16-le": np.dtype("<u2"),
    "utf-16-be": np.dtype(">u2"),
    "utf-32-le": np.dtype("<u4"),
    "utf-32-be": np.dtype(">u4"),
}


def decode(data: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """Decode the text; count the places that are replaced by U+FFFD."""
    try:
        return data.decode(encoding), 0
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        genuine = data.decode(encoding, "ignore").count(REPLACEMENT)
        return text, text.count(REPLACEMENT) - genuine


def whole_bytes(data: bytes, encoding: str) -> int:
    """Return how many bytes of a block hold whole characters: the rest belongs to the next block.

    Broken text is cut so that its parts give the same characters as the whole.
    """
    if encoding == "utf-8":
        for place in range(len(data) - 1, max(len(data) - 5, -1), -1):
            byte = data[place]
            if byte < 0x80:
                return place + 1
            if byte >= 0xC0:
                # A first byte: whole when all of its character is there.
                length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
                return len(data) if len(data) - place >= length else place
        # Four bytes that continue something: the last is a stray, and cuts nothing.
        return len(data)
    unit = UNITS[encoding]
    whole = len(data) - len(data) % unit.itemsize
    if unit.itemsize == 2 and whole:
        [last] = np.frombuffer(data[whole - 2 : whole], unit)
        # The first half of a surrogate pair waits for its second.
        whole -= 2 if 0xD800 <= last < 0xDC00 else 0
    return whole


def decoded_blocks(file: BinaryIO, encoding: str, nbytes: int) -> Iterator[tuple[str, int]]:
    """Yield the next `nbytes` of the file as text, block by block, with the replaced places."""
    rest = b""
    while nbytes > 0 and (block := file.read(min(nbytes, BLOCK_BYTES))):
        nbytes -= len(block)
        data = rest + block
        place = whole_bytes(data, encoding)
        yield decode(data[:place], encoding)
        rest = data[place:]
    if rest:
        yield decode(rest, encoding)


class Lines:
    """The lines of an open file of any encoding, by byte offset."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._end = "\n".encode(encoding)
        self._dtype = UNITS[encoding]
        self._unit = self._dtype.itemsize

    def first_start(self, start: int, stop: int) -> int | None:
        """Find the first line that starts in [start, stop), which are multiples of the unit.

        Only these bytes are read, and the unit before them: a line that fills many pieces is not
        read again for each. None when no line starts there.
        """
        if start == 0:
            return 0
        place = start - self._unit
        self._file.seek(place)
        # A line that ends at `stop` is followed by one that starts there, outside.
        last, step = stop - self._unit, FIRST_BLOCK_BYTES
        while place < last and (block := self._file.read(min(step, last - place))):
            found = self._find(block)
            if found >= 0:
                return place + found + self._unit
            place += len(block)
            step = min(2 * step, BLOCK_BYTES)
        return None

    def _find(self, block: bytes) -> int:
        """Find the first line end in a block that begins at a unit; -1 without one."""
        place = block.find(self._end)
        while place % self._unit and place >= 0:
            place = block.find(self._end, place + 1)
        return place

    def read(self, most: int) -> bytes:
        """Read the line at the file's position, its end included, at most about `most` bytes."""
        if self._unit == 1:
            return self._file.readline(most)
        line = bytearray()
        # A byte 0x0A is part of a unit, which is a line end or another character.
        while len(line) < most and (part := self._file.readline(most)):
            line += part
            line += self._file.read(-len(line) % self._unit)
            if line.endswith(self._end):
                break
        return bytes(line)

    def count_ends(self, nbytes: int) -> int:
        """Count the line ends in the first `nbytes` of the file."""
        self._file.seek(0)
        count = 0
        while nbytes > 0 and (block := self._file.read(min(nbytes, BLOCK_BYTES))):
            nbytes -= len(block)
            whole = len(block) - len(block) % self._unit
            count += int((np.frombuffer(block[:whole], self._dtype) == ord("\n")).sum())
        return count
