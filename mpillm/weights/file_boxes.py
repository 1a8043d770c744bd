"""Read boxes of tensors by their place in a file: the bytes of the box, each once, and no others.

A mapped file would be counted as memory of the process, page by page, until the system needs it.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpillm.system.hdf5 import read_at
from mpillm.system.plain_files import open_plain
from mpillm.weights.slices import Box


def read_box(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype, box: Box) -> Tensor:
    """Read a box of the row-major tensor of `shape` whose first byte is `offset` of the file.

    Raises OSError, and EOFError where the file ends before.
    """
    values = torch.empty(box.numel, dtype=dtype)
    # As bytes: NumPy lacks some dtypes.
    data, width = values.view(torch.uint8).numpy(), dtype.itemsize
    dims = len(shape)
    # Dims ahead of `cut` number the runs; a run is contiguous, for it is cut along one dim alone.
    cut = next((d for d in reversed(range(dims)) if box.size[d] != shape[d]), 0)
    run = math.prod(box.size[cut:]) * width
    strides = [math.prod(shape[d + 1 :]) * width for d in range(dims)]
    with open_plain(path) as file:
        indices = itertools.product(*(range(size) for size in box.size[:cut]))
        for number, index in enumerate(indices if run else ()):
            place = (*map(sum, zip(index, box.start, strict=False)), *box.start[cut:])
            first = offset + sum(a * b for a, b in zip(place, strides, strict=True))
            read_at(file.fileno(), data[number * run : (number + 1) * run], first)
    return values.view(box.size)
