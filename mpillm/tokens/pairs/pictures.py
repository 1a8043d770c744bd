"""Pictures to arrays (channels, height, width): lists of numbers, .npy files, PNG and others."""

from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import DataError, UsageError
from mpillm.system.extras import install_command, installed
from mpillm.system.messages import explain
from mpillm.tokens.text.records import RecordError

Array = np.ndarray[Any, np.dtype[Any]]
# Grey, grey and alpha, colours, colours and alpha.
MOST_CHANNELS = 4


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
        if path.suffix.lower() == ".npy":
            return _planes(np.load(path, allow_pickle=False))
        return _planes(_decoded(path))
    except OSError as failure:
        raise DataError(f"cannot read the picture {explain(failure, path)}") from failure
    except (ValueError, EOFError, SyntaxError) as failure:
        raise DataError(f"{path} is no picture that can be read: {failure}") from failure


def _array_of_lists(value: list[Any]) -> Array:
    try:
        array = np.array(value)
    except ValueError as failure:
        raise RecordError("has a picture whose rows are not equally long") from failure
    if array.dtype.kind not in "iuf" or not array.size:
        raise RecordError("has a picture whose lists hold other things than numbers")
    return array


def _decoded(path: Path) -> Array:
    if not installed("PIL"):
        raise UsageError(f"pictures such as {path.name} need Pillow: {install_command('PIL')}")
    from PIL import Image

    with Image.open(path) as image:
        plain = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
        return np.asarray(plain)


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
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return np.ascontiguousarray(array, np.uint8)
    return np.ascontiguousarray(array, "<f4")


def _channels_are_last(first: int, last: int) -> bool:
    """Decide by the number that channels mostly have, then by the one that they can have."""
    if first in (1, 3) or last in (1, 3):
        return first not in (1, 3)
    return first > MOST_CHANNELS >= last
