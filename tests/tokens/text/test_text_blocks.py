"""Text by blocks is the text of the whole, in every encoding, broken or not."""

import io
import random

import pytest
from mpi4py import MPI

from mpillm.tokens.text import text_blocks
from mpillm.tokens.text.text_blocks import UNITS, Lines, decode, decoded_blocks, whole_bytes

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="no messages: serial pass only")

# U+0A0A and U+0A0D hold the byte of a line end, 😀 is a pair in UTF-16.
TEXT = "aé\n中😀\u0a0a\u0a0d \ufffd\n\n\u0a00x\r\n"
ENCODINGS = pytest.mark.parametrize("encoding", UNITS)


@ENCODINGS
@pytest.mark.parametrize("broken", [False, True])
def test_blocks_give_the_whole_text(encoding: str, broken: bool, monkeypatch) -> None:
    chance = random.Random(1)
    for _ in range(400):
        data = bytearray("".join(chance.choices(TEXT, k=30)).encode(encoding))
        if broken:
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(len(data))] = chance.choice([0x80, 0xBF, 0xE0, 0xF0, 0xD8])
            del data[chance.randrange(len(data)) :]
        monkeypatch.setattr(text_blocks, "BLOCK_BYTES", chance.randint(1, 9))
        blocks = list(decoded_blocks(io.BytesIO(data), encoding, len(data)))
        text, replaced = decode(bytes(data), encoding)
        assert "".join(part for part, _ in blocks) == text
        assert sum(count for _, count in blocks) == replaced
        assert bool(replaced) <= broken


def test_a_run_of_strays_does_not_grow_the_rest() -> None:
    assert whole_bytes(b"\x80" * 9, "utf-8") == 9
    assert whole_bytes(b"abc\xf0\x9f", "utf-8") == 3
    assert whole_bytes(b"", "utf-8") == 0


@ENCODINGS
def test_lines_are_those_of_the_text(encoding: str) -> None:
    chance = random.Random(2)
    for _ in range(60):
        text = "".join(chance.choices(TEXT, k=40))
        data = text.encode(encoding)
        expected = list(io.StringIO(text, newline="\n"))
        lines = Lines(io.BytesIO(data), encoding)
        assert [lines.read(1 << 20).decode(encoding) for _ in expected] == expected
        assert lines.read(1 << 20) == b""
        assert lines.count_ends(len(data)) == text.count("\n")


@ENCODINGS
@pytest.mark.parametrize("units", [1, 2, 5, 64])
def test_each_line_starts_in_one_piece(encoding: str, units: int) -> None:
    chance = random.Random(3)
    for _ in range(60):
        text = "".join(chance.choices(TEXT, k=40))
        data, step = text.encode(encoding), units * UNITS[encoding].itemsize
        starts, place = [], 0
        for line in io.StringIO(text, newline="\n"):
            starts.append(place)
            place += len(line.encode(encoding))
        file = io.BytesIO(data)
        for start in range(0, len(data), step):
            inside = [one for one in starts if start <= one < start + step]
            found = Lines(file, encoding).first_start(start, min(start + step, len(data)))
            assert found == (inside[0] if inside else None)
