"""Pictures to arrays (channels, height, width): lists of numbers, .npy files, PNG and others."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpillm.errors import DataError, UsageError
from mpillm.system.extras import install_command, installed
from mpillm.system.messages import explain
from mpillm.system.plain_files import open_plain
from mpillm.tokens.text.records import RecordError

Array = np.ndarray[Any, np.dtype[Any]]
# Grey, grey and alpha, colours, colours and alpha.
MOST_CHANNELS = 4
# A gigabyte of float32: more than the picture of any known data set.
LARGEST_PICTURE = 1 << 28
# What Pillow decodes as it is; wider grey ones ("I", "I;16", "F") too, as RGB would clip them.
PLAIN_MODES = ("L", "LA", "RGB", "RGBA")


def picture_of(value: Any, folder: Path) -> Array:
    """Return a record's picture, uint8 or float32 (C, H, W); `value`: lists, or a path.

    A path begins in `folder`. Raises RecordError, DataError, and UsageError without Pillow.
    """
    if isinstance(value, list):
        return _planes(_array_of_lists(value))
    if not isinstance(value, str):
        raise RecordError("has a picture that is neither a path nor lists of numbers")
    path = folder / value
    try:
        with open_plain(path) as file:
            return _planes(_mapped(path) if path.suffix.lower() == ".npy" else _decoded(file, path))
    except OSError as failure:
        raise DataError(f"cannot read the picture {explain(failure, path)}") from failure


def _mapped(path: Path) -> Array:
    """Map a .npy file: a header that declares more than the file holds takes no memory."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, OverflowError, EOFError, SyntaxError) as failure:
        raise _no_picture(path, failure) from failure


def _no_picture(path: Path, failure: Exception) -> DataError:
    return DataError(
        f"{path} is no picture that can be read: {failure}; leave its record out, or save it again"
    )


def _array_of_lists(value: list[Any]) -> Array:
    try:
        array = np.array(value)
    except ValueError as failure:
        raise RecordError("has a picture whose rows are not equally long") from failure
    return array


def _decoded(file: BinaryIO, path: Path) -> Array:
    if not installed("PIL"):
        raise UsageError(f"pictures such as {path.name} need Pillow: {install_command('PIL')}")
    from PIL import Image

    try:
        with Image.open(file) as image:
            kept = image.mode in PLAIN_MODES or image.mode.startswith(("I", "F"))
            return np.asarray(image if kept else image.convert("RGB"))
    except MemoryError:
        raise
    # Its decoders raise whatever a damaged file leads them to.
    except Exception as failure:
        raise _no_picture(path, failure) from failure


def _planes(array: Array) -> Array:
    """Put channels first: of (H, W), (C, H, W) or (H, W, C), where C is 1 to 4."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and _channels_are_last(array.shape[0], array.shape[2]):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or not array.size or array.shape[0] > MOST_CHANNELS:
        raise RecordError(
            f"has a picture of the shape {list(array.shape)}: (height, width), with 1 to "
            f"{MOST_CHANNELS} channels ahead of them or after"
        )
    if array.size > LARGEST_PICTURE:
        raise RecordError(
            f"has a picture of {array.size:,} numbers, and it may have {LARGEST_PICTURE:,}; "
            "make it smaller"
        )
    if array.dtype.kind not in "biuf":
        raise RecordError(f"has a picture of other things than numbers ({array.dtype})")
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return np.ascontiguousarray(array, np.uint8)
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, "<f4")
    if not np.isfinite(numbers).all():
        raise RecordError("has a picture with NaN, or numbers beyond float32; repair it first")
    return numbers


def _channels_are_last(first: int, last: int) -> bool:
    """Decide by the number that channels mostly have, then by the one that they can have."""
    if first in (1, 3) or last in (1, 3):
        return first not in (1, 3)
    return first > MOST_CHANNELS >= last
