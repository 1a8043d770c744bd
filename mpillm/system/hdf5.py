"""HDF5 files of contiguous arrays: laid out by h5py, written and read by byte offset.

A contiguous HDF5 dataset is a plain run of bytes at a known offset. So reading it is as fast as a
raw file, while h5ls, h5py, MATLAB and Julia still open it. Nothing here keeps an h5py handle open,
so readers may be forked, pickled and used from threads.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

ALIGNMENT_BYTES = 4096
ALIGNMENT_THRESHOLD_BYTES = 65536
# One call of write(2) or preadv(2) moves at most 2^31 - 4096 bytes on Linux.
LARGEST_CALL_BYTES = 1 << 30

# HDF5 keeps the system's error number only in its text.
_ERRNO = re.compile(r"errno = (\d+)")

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Extent:
    """The place of an array in its file: `nbytes` from byte `offset`, row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def layout(
    path: Path, arrays: Mapping[str, tuple[Any, tuple[int, ...]]], attributes: Mapping[str, Any]
) -> dict[str, Extent]:
    """Create the file at `path` with space for `arrays` (name → dtype, shape); return their places.

    The values are not written yet. No time stamps are stored, so equal contents give equal bytes.
    Raises OSError with the file and the system's own words (ENOSPC on a full disk).
    """
    with _plain_errors(path):
        return _layout(path, arrays, attributes)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Raise the OSError that HDF5 wraps in its own words."""
    try:
        yield
    except (OSError, RuntimeError) as failure:
        found = _ERRNO.search(str(failure))
        code = int(found.group(1)) if found else getattr(failure, "errno", None)
        if not code:
            raise OSError(f"HDF5 cannot write {path}: {failure}") from failure
        raise OSError(code, os.strerror(code), str(path)) from failure


def _layout(
    path: Path, arrays: Mapping[str, tuple[Any, tuple[int, ...]]], attributes: Mapping[str, Any]
) -> dict[str, Extent]:
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    with h5py.File(
        path,
        "w",
        libver=("v108", "v110"),
        locking=False,
        alignment_threshold=ALIGNMENT_THRESHOLD_BYTES,
        alignment_interval=ALIGNMENT_BYTES,
    ) as file:
        places = {}
        for name, (given, shape) in arrays.items():
            dtype = np.dtype(given).newbyteorder("<")
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            dataset = h5py.h5d.create(
                file.id, name.encode(), h5py.h5t.py_create(dtype), space, create, link
            )
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            # HDF5 gives an empty dataset no place in the file.
            offset = dataset.get_offset() if nbytes else 0
            places[name] = Extent(dtype.str, shape, offset, nbytes)
        for key, value in attributes.items():
            file.attrs[key] = value
    return places


def places(path: Path) -> tuple[dict[str, Extent], dict[str, Any]]:
    """Read the places of the arrays, and the root attributes, by HDF5 itself.

    Raises OSError alone: for another kind of file, for links, and where an array is not a
    contiguous run of bytes in this file.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return dict(_extents(file, "", set())), dict(file.attrs)
    except OSError:
        raise
    except Exception as failure:
        # h5py raises whatever it meets: RuntimeError, KeyError, TypeError, ValueError, …
        raise OSError(f"HDF5 cannot read it: {failure}") from failure


def _extents(group: h5py.Group, prefix: str, seen: set[int]) -> Iterator[tuple[str, Extent]]:
    """Yield the arrays below `group` with their names; `seen` holds the addresses of groups."""
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:
        raise OSError(f"the group {prefix or '/'} is there twice; store each array once")
    seen.add(address)
    for key in group:
        name = f"{prefix}{key}"
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise OSError(f"{name} is a link to another place; store the array itself")
        item = group[key]
        if isinstance(item, h5py.Group):
            yield from _extents(item, f"{name}/", seen)
        elif isinstance(item, h5py.Dataset):
            offset, shape = _offset(item, name), item.shape
            yield name, Extent(item.dtype.str, shape, offset, item.nbytes)


def _offset(dataset: h5py.Dataset, name: str) -> int:
    if dataset.external or dataset.is_virtual:
        raise OSError(f"the array {name} is stored in another file; store it in this one")
    if dataset.shape is None:
        raise OSError(f"the array {name} has no shape; store it contiguous")
    offset = dataset.id.get_offset()
    if offset is None and dataset.nbytes:
        raise OSError(
            f"the array {name} is chunked, compact or never written, so it has no offset; "
            "store it contiguous"
        )
    return offset or 0


def write_at(descriptor: int, values: np.ndarray[Any, Any], offset: int) -> None:
    """Write the bytes of a C-contiguous array at `offset`.

    Raises OSError, ENOSPC on a full disk.
    """
    whole, done = values.reshape(-1).view(np.uint8).data, 0
    while done < len(whole):
        chunk = whole[done : done + LARGEST_CALL_BYTES]
        done += os.pwrite(descriptor, chunk, offset + done)


def read_at(descriptor: int, values: np.ndarray[Any, Any], offset: int) -> None:
    """Fill a C-contiguous array from the bytes at `offset`.

    Raises EOFError when the file ends too early.
    """
    whole, done = values.reshape(-1).view(np.uint8).data, 0
    while done < len(whole):
        chunk = whole[done : done + LARGEST_CALL_BYTES]
        got = os.preadv(descriptor, [chunk], offset + done)
        if got == 0:
            raise EOFError(f"the file ends before byte {offset + done + len(chunk)}")
        done += got


def block_hashes(
    values: np.ndarray[Any, Any], block_bytes: int
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hash each `block_bytes` of a C-contiguous array by xxh3-64; the last block may be short."""
    whole = values.reshape(-1).view(np.uint8).data
    starts = range(0, len(whole), block_bytes)
    return np.array(
        [xxhash.xxh3_64_intdigest(whole[s : s + block_bytes]) for s in starts], dtype="<u8"
    )


class Digest:
    """The hash of bytes that come in pieces, as `digest` gives it for the whole."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Add the bytes of a C-contiguous array."""
        self._state.update(values.data)

    @property
    def text(self) -> str:
        """32 hexadecimal digits."""
        return self._state.hexdigest()


def digest(values: np.ndarray[Any, Any] | Bytes) -> str:
    """Hash the bytes, or those of a C-contiguous array, by xxh3-128, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(values.data if isinstance(values, np.ndarray) else values)
