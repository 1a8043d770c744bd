"""Arrays in HDF5: h5py reads ours and we read its; equal contents, equal bytes."""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from mpillm.system import hdf5

Arrays = Mapping[str, np.ndarray[Any, Any]]
ARRAYS: Arrays = {
    "tokens": np.arange(100_000, dtype="u2"),
    "model/layers/0/weight": np.linspace(0, 1, 12, dtype="f4").reshape(3, 4),
    "step": np.array(7, dtype="i8"),
    "none": np.empty((0, 3), dtype="f4"),
    "flags": np.array([True, False]),
    "halves": np.array([0.5, -2], dtype="f2"),
    "bytes": np.frombuffer(b"mpillm", dtype="u1"),
}
ATTRIBUTES = {"format": "test", "steps": 3, "sizes": [1, 2, 3]}


def write(path: Path, arrays: Arrays = ARRAYS) -> dict[str, hdf5.Extent]:
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    places = hdf5.layout(path, shapes, ATTRIBUTES)
    with path.open("r+b", buffering=0) as file:
        for name, array in arrays.items():
            hdf5.write_at(file.fileno(), array, places[name].offset)
    return places


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    with path.open("rb", buffering=0) as file:
        for name, place in hdf5.places(path)[0].items():
            found[name] = np.empty(place.shape, place.dtype)
            hdf5.read_at(file.fileno(), found[name], place.offset)
    return found


def test_what_we_write_we_read(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    found = read(tmp_path / "a.h5")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_we_write_h5py_reads(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r") as file:
        for name, array in ARRAYS.items():
            assert file[name].shape == array.shape
            np.testing.assert_array_equal(file[name][()], array)
        assert file.attrs["format"] == "test"
        assert file.attrs["steps"] == 3
        assert file.attrs["sizes"].tolist() == [1, 2, 3]


def test_layout_and_places_agree(tmp_path: Path) -> None:
    places = write(tmp_path / "a.h5")
    assert hdf5.places(tmp_path / "a.h5")[0] == places


def test_what_h5py_writes_we_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["there/it/is"] = np.arange(5, dtype=">i4")
    place = hdf5.places(tmp_path / "a.h5")[0]["there/it/is"]
    assert (place.dtype, place.shape, place.nbytes) == (">i4", (5,), 20)
    np.testing.assert_array_equal(read(tmp_path / "a.h5")["there/it/is"], range(5))


@pytest.mark.parametrize("options", [{"chunks": (5,)}, {"chunks": (5,), "compression": "gzip"}])
def test_an_array_without_a_place_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("scattered", data=np.arange(10), **options)
    with pytest.raises(OSError, match=r"the array scattered is .* store it contiguous"):
        hdf5.places(tmp_path / "a.h5")


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    # HDF5 counts its times in seconds.
    time.sleep(1.1)
    write(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_large_arrays_begin_on_a_page_and_none_overlap(tmp_path: Path) -> None:
    places = write(tmp_path / "a.h5")
    assert places["tokens"].nbytes > hdf5.ALIGNMENT_THRESHOLD_BYTES
    assert places["tokens"].offset % hdf5.ALIGNMENT_BYTES == 0
    spans = sorted(
        (place.offset, place.offset + place.nbytes) for place in places.values() if place.nbytes
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert spans[0][0] > 0
    assert spans[-1][1] <= (tmp_path / "a.h5").stat().st_size


def test_arrays_are_stored_little_endian(tmp_path: Path) -> None:
    assert hdf5.layout(tmp_path / "a.h5", {"a": (">u4", (2,))}, {})["a"].dtype == "<u4"


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    places = write(tmp_path / "a.h5")
    os.truncate(tmp_path / "a.h5", places["tokens"].offset + 1000)
    tokens = np.empty(100_000, "u2")
    with (
        (tmp_path / "a.h5").open("rb", buffering=0) as file,
        pytest.raises(EOFError, match="the file ends before byte"),
    ):
        hdf5.read_at(file.fileno(), tokens, places["tokens"].offset)


def test_what_is_no_hdf5_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("no array here")
    with pytest.raises(OSError, match=r"signature not found|truncated"):
        hdf5.places(tmp_path / "a.h5")


def test_a_long_array_moves_in_several_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "LARGEST_CALL_BYTES", 1000)
    write(tmp_path / "a.h5")
    np.testing.assert_array_equal(read(tmp_path / "a.h5")["tokens"], ARRAYS["tokens"])


def test_calls_that_move_less_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda to, data, offset: pwrite(to, data[:777], offset))
    monkeypatch.setattr(os, "preadv", lambda of, data, offset: preadv(of, [data[0][:777]], offset))
    write(tmp_path / "a.h5")
    np.testing.assert_array_equal(read(tmp_path / "a.h5")["tokens"], ARRAYS["tokens"])


def test_block_hashes_tell_which_block_changed() -> None:
    array = np.arange(1000, dtype="u2")
    hashes = hdf5.block_hashes(array, 600)
    assert hashes.tolist() == [
        xxhash.xxh3_64_intdigest(array.tobytes()[s : s + 600]) for s in range(0, 2000, 600)
    ]
    array[350] += 1
    assert np.flatnonzero(hdf5.block_hashes(array, 600) != hashes).tolist() == [1]
    assert hdf5.block_hashes(np.empty((0, 3)), 600).shape == (0,)


def test_a_digest_is_of_the_bytes() -> None:
    array = np.arange(6, dtype="i4").reshape(2, 3)
    assert hdf5.digest(array) == hdf5.digest(array.tobytes()) == hdf5.digest(array.reshape(-1))
    assert len(hdf5.digest(array)) == 32
    assert hdf5.digest(np.empty(0)) == hdf5.digest(b"") != hdf5.digest(array)
