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


def test_without_pillow_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpillm.tokens.pairs.pictures.installed", lambda package: False)
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
