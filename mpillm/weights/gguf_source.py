"""A GGUF file, as of llama.cpp, as a source of tensors: quantised ones are read in float32.

The package gguf maps the file and knows the quantised types; rows are dequantised as they are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.system.extras import require_packages
from mpillm.system.messages import why
from mpillm.weights.gguf_header import check_gguf_header
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


class GgufSource(TensorSource):
    """The tensors of a GGUF file. `facts`: its metadata; arrays of it by `array`."""

    kind: ClassVar[str] = "GGUF"

    def __init__(self, path: Path) -> None:
        """Open the file and check its header. Raises CheckpointError with the fault."""
        require_packages(f"reading {path}", "gguf")
        from gguf import GGUFReader

        try:
            check_gguf_header(path)
            self._reader = GGUFReader(path)
        # The reader checks little: a bad offset is an IndexError or a ValueError of NumPy.
        except Exception as failure:
            raise CheckpointError(
                f"{path} is no GGUF file, or is damaged: {why(failure)}; download it again"
            ) from failure
        self._entries = {str(entry.name): entry for entry in self._reader.tensors}
        tensors = {}
        for name, entry in self._entries.items():
            kind = entry.tensor_type.name
            # GGUF counts dims from the innermost.
            shape = tuple(int(size) for size in reversed(entry.shape.tolist()))
            tensors[name] = TensorInfo(PLAIN.get(kind, kind), shape, int(entry.n_bytes))
        facts = {
            name: _value(field)
            for name, field in self._reader.fields.items()
            if not name.startswith("GGUF.") and field.types[0].name != "ARRAY"
        }
        super().__init__(path, tensors, facts)

    def array(self, name: str) -> list[Any]:
        """Return the array `name` of the metadata, such as the tokens; [] where there is none."""
        field = self._reader.fields.get(name)
        return [] if field is None else list(field.contents())

    def read(self, name: str, box: Box | None = None) -> Tensor:
        from gguf.quants import dequantize

        entry, info = self._entries[name], self.tensors[name]
        wanted = whole_box(info.shape) if box is None else box
        cuts = [slice(a, a + n) for a, n in zip(*wanted, strict=True)]
        try:
            stored: Any = entry.data[tuple(cuts[:-1])]
            if info.dtype not in PLAIN.values():
                stored = dequantize(stored, entry.tensor_type)
            # The innermost dim is cut last: elements of a row share scales.
            values = np.array(stored[(..., *cuts[-1:])])
        except NotImplementedError as failure:
            raise CheckpointError(
                f"{name} in {self.path} is quantised as {info.dtype}, which the package gguf "
                "cannot read; convert the file to F16 or Q8_0 with llama.cpp's llama-quantize"
            ) from failure
        except Exception as failure:
            raise CheckpointError(
                f"cannot read {name} from {self.path}: {why(failure)}"
            ) from failure
        return torch.from_numpy(values).reshape(wanted.size)


def _value(field: Any) -> Any:
    value = field.contents()
    return value.item() if isinstance(value, np.generic) else value
