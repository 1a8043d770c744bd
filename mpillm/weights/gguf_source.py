"""A GGUF file, as of llama.cpp, as a source of tensors: quantised ones are read in float32.

The package gguf knows the quantised types; rows are dequantised as they are read.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.system.extras import require_packages
from mpillm.system.messages import why
from mpillm.weights.file_boxes import read_box
from mpillm.weights.gguf_header import GgufEntry, read_gguf_array, read_gguf_header
from mpillm.weights.slices import Box, whole_box
from mpillm.weights.tensor_source import TensorInfo, TensorSource

SUFFIX = ".gguf"
# GGUF's names of types that are not quantised → torch's.
PLAIN: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
}
# Of a tensor that is dequantised at once: the package needs several times their memory.
ELEMENTS_AT_ONCE = 1 << 20


class GgufSource(TensorSource):
    """The tensors of a GGUF file. `facts`: its metadata; arrays of it by `array`."""

    kind: ClassVar[str] = "GGUF"

    def __init__(self, path: Path) -> None:
        """Open the file and check its header. Raises CheckpointError with the fault."""
        require_packages(f"reading {path}", "gguf")
        try:
            self._header = read_gguf_header(path)
            tensors = {
                name: _info(name, entry, self._header.nbytes)
                for name, entry in self._header.entries.items()
            }
        except (OSError, ValueError) as failure:
            raise _damaged(path, failure) from failure
        super().__init__(path, tensors, self._header.facts)

    def array(self, name: str) -> list[Any]:
        """Return the array `name` of the metadata, such as the tokens; [] where there is none."""
        found = self._header.arrays.get(name)
        try:
            return [] if found is None else read_gguf_array(self.path, found)
        except (OSError, ValueError) as failure:
            raise _damaged(self.path, failure) from failure

    def read(self, name: str, box: Box | None = None) -> Tensor:
        info = self.tensors[name]
        wanted = whole_box(info.shape) if box is None else box
        entry = self._header.entries[name]
        try:
            if info.dtype in PLAIN.values():
                dtype = getattr(torch, info.dtype)
                return read_box(self.path, entry.offset, info.shape, dtype, wanted)
            return self._dequantised(entry, wanted)
        except NotImplementedError as failure:
            raise CheckpointError(
                f"{name} in {self.path} is quantised as {info.dtype}, which the package gguf "
                "cannot read; convert the file to F16 or Q8_0 with llama.cpp's llama-quantize"
            ) from failure
        except (OSError, EOFError) as failure:
            raise CheckpointError(
                f"cannot read {name} from {self.path}: {why(failure)}"
            ) from failure

    def _dequantised(self, entry: GgufEntry, box: Box) -> Tensor:
        """Read whole rows, whose elements share scales, some at a time; return the box of them."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(entry.kind)
        row_bytes = _bytes_of(kind, entry.shape[-1])
        if not box.numel:
            return torch.empty(box.size)
        values = torch.empty(box.size)
        rows = values if values.dim() > 1 else values[None]
        shape, start, size = entry.shape[:-1] or (1,), box.start[:-1] or (0,), box.size[:-1] or (1,)
        step = max(1, ELEMENTS_AT_ONCE // (math.prod(size[1:]) * entry.shape[-1]))
        columns = slice(box.start[-1], box.start[-1] + box.size[-1])
        for first in range(0, size[0], step):
            count = min(step, size[0] - first)
            part = Box((start[0] + first, *start[1:], 0), (count, *size[1:], row_bytes))
            stored = read_box(self.path, entry.offset, (*shape, row_bytes), torch.uint8, part)
            found = torch.from_numpy(dequantize(stored.numpy(), kind))
            rows[first : first + count] = found[..., columns]
        return values


def _info(name: str, entry: GgufEntry, nbytes: int) -> TensorInfo:
    """Describe a tensor. Raises ValueError where it is of no known type or ends after the file."""
    from gguf import GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(entry.kind)
    except ValueError:
        raise ValueError(f"{name!r:.80} has the unknown type {entry.kind}") from None
    rows = math.prod(entry.shape[:-1])
    size = rows * _bytes_of(kind, entry.shape[-1] if entry.shape else 1)
    if entry.offset + size > nbytes:
        raise ValueError(f"{name!r:.80} ends at byte {entry.offset + size} of {nbytes}")
    return TensorInfo(PLAIN.get(kind.name, kind.name), entry.shape, size)


def _bytes_of(kind: Any, columns: int) -> int:
    """Return the bytes of a row. Raises ValueError where it is no multiple of a block."""
    from gguf import GGML_QUANT_SIZES

    elements, nbytes = GGML_QUANT_SIZES[kind]
    if columns % elements:
        raise ValueError(f"a row of {columns} elements is no multiple of {kind.name}'s {elements}")
    return columns // elements * int(nbytes)


def _damaged(path: Path, failure: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no GGUF file, or is damaged: {why(failure)}; download it again"
    )
