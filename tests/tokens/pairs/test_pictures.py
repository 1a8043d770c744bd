import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from mpillm.errors import DataError, UsageError
from mpillm.tokens.pairs.pictures import picture_of
from mpillm.tokens.text.records import RecordError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6), (1, 5, 6)),
        ((3, 5, 6), (3, 5, 6)),
        ((5, 6, 1), (1, 5, 6)),
        ((4, 6, 3), (3, 4, 6)),
        ((2, 5, 6), (2, 5, 6)),
        ((5, 6, 4), (4, 5, 6)),
    ],
)
def test_channels_come_first(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape) / 7
    np.save(tmp_path / "a.npy", array)
    for given in ("a.npy", array.tolist()):
        made = picture_of(given, tmp_path)
        assert (made.shape, made.dtype) == (expected, np.float32)
        assert sorted(made.flatten()) == pytest.approx(sorted(array.flatten()))


def test_whole_numbers_of_a_byte_are_bytes() -> None:
    assert picture_of([[0, 255]], Path()).dtype == np.uint8
    assert picture_of([[0, 256]], Path()).dtype == np.float32
    assert picture_of([[-1, 25]], Path()).dtype == np.float32


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for value in ([[[[1]]]], [], ["a"], np.zeros((5, 5, 5)).tolist()):
        with pytest.raises(RecordError):
            picture_of(value, tmp_path)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0v\0{'descr': '|O', ")
    with pytest.raises(DataError, match=r"a.npy is no picture that can be read"):
        picture_of("a.npy", tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf),
        np.full((4, 4), 1e300),
        np.ones((4, 4), complex),
        np.zeros((4, 4), [("a", "i4")]),
        np.zeros((4, 4), "M8[s]"),
        np.full((4, 4), "a"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(RecordError, match=r"other things than numbers|NaN, or numbers beyond"):
        picture_of("a.npy", tmp_path)


def test_odd_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    for name in ("pipe.npy", "pipe.png"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="a pipe or a device"):
            picture_of(name, tmp_path)
    with zipfile.ZipFile(tmp_path / "zip.npy", "w") as archive:
        archive.writestr("a.npy", b"")
    # Declared, and not there: no memory is taken for it.
    np.lib.format.open_memmap(tmp_path / "huge.npy", "w+", "<f8", (4, 4))
    data = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(
        data.replace(b"(4, 4), }" + b" " * 12, b"(9999999999, 99999), }")
    )
    (tmp_path / "bomb.png").write_bytes(png_head(60_000, 60_000))
    for name in ("zip.npy", "huge.npy", "bomb.png"):
        with pytest.raises(DataError, match=f"{name} is no picture that can be read: "):
            picture_of(name, tmp_path)


def png_head(width: int, height: int) -> bytes:
    """The head of a grey PNG."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    length, check = struct.pack(">I", len(body) - 4), struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + length + body + check


def test_more_than_bytes_are_kept(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    wide = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    image.fromarray(wide).save(tmp_path / "a.png")
    np.testing.assert_array_equal(picture_of("a.png", tmp_path), wide[None].astype("<f4"))


def test_without_pillow_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpillm.tokens.pairs.pictures.installed", lambda package: False)
    (tmp_path / "a.png").write_bytes(png_head(4, 4))
    with pytest.raises(UsageError, match=r"a.png need Pillow: pip install 'mpillm\[pictures\]'"):
        picture_of("a.png", tmp_path)


def test_png_is_decoded(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(COLOURS).save(tmp_path / "a.png")
    image.fromarray(COLOURS[..., 0]).save(tmp_path / "grey.png")
    assert (picture_of("a.png", tmp_path) == COLOURS.transpose(2, 0, 1)).all()
    assert (picture_of("grey.png", tmp_path) == COLOURS[None, ..., 0]).all()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b.png"):
        picture_of("b.png", tmp_path)
