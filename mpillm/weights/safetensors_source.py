"""Files of the format safetensors, alone or in a Hugging Face folder, as a source of tensors.

The package safetensors checks a file's header: offsets that overlap or leave the file, and shapes
beyond its bytes, are refused before anything is read. The bytes of a box are then read by offset.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpillm.errors import CheckpointError
from mpillm.system.extras import require_packages
from mpillm.system.json_text import read_json, read_object
from mpillm.system.messages import some_of, why
from mpillm.system.plain_files import is_plain_name, open_plain
from mpillm.weights.file_boxes import read_box
from mpillm.weights.index import LARGEST
from mpillm.weights.slices import Box, whole_box
from mpillm.weights.tensor_source import TensorInfo, TensorSource

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SUFFIX = ".safetensors"
# The key of a header that is no tensor.
METADATA = "__metadata__"
# Formats that run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# safetensors' names of types → torch's, and their bytes.
DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F64": ("float64", 8),
        "F32": ("float32", 4),
        "F16": ("float16", 2),
        "BF16": ("bfloat16", 2),
        "F8_E4M3": ("float8_e4m3fn", 1),
        "F8_E5M2": ("float8_e5m2", 1),
        "I64": ("int64", 8),
        "I32": ("int32", 4),
        "I16": ("int16", 2),
        "I8": ("int8", 1),
        "U8": ("uint8", 1),
        "BOOL": ("bool", 1),
    }
)


class SafetensorsSource(TensorSource):
    """The tensors of one safetensors file, or of all files of a Hugging Face folder.

    `facts`: the folder's `config.json`; the metadata of a lone file.
    """

    kind: ClassVar[str] = "safetensors"

    def __init__(self, path: Path) -> None:
        """Open the files and check their headers. Raises CheckpointError with the fault."""
        require_packages(f"reading {path}", "safetensors")
        index = _weight_map(path)
        files = [path] if path.is_file() else _files_of(path, index)
        headers = {file: _header(file) for file in files}
        self._places: dict[str, tuple[Path, int]] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, (start, header) in headers.items():
            for name, entry in header.items():
                if name == METADATA:
                    continue
                if name in tensors:
                    raise CheckpointError(
                        f"{name} is in {self._places[name][0].name} and in {file.name} of {path}; "
                        "download the folder again"
                    )
                tensors[name] = _info(entry, name, file)
                self._places[name] = file, start + entry["data_offsets"][0]
        _compare(path, index, {name: file for name, (file, _) in self._places.items()})
        metadata = headers[path][1].get(METADATA) if path in headers else None
        super().__init__(path, tensors, _facts(path, metadata or {}))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        (file, offset), info = self._places[name], self.tensors[name]
        wanted = whole_box(info.shape) if box is None else box
        try:
            return read_box(file, offset, info.shape, getattr(torch, info.dtype), wanted)
        except (OSError, EOFError) as failure:
            raise CheckpointError(f"cannot read {name} from {file}: {why(failure)}") from failure


def is_folder_of_safetensors(path: Path) -> bool:
    """Return whether `path` is a folder with weights of this format, or with its index."""
    return path.is_dir() and any((path / name).exists() for name in (SINGLE, INDEX))


def refuse_pickles(path: Path) -> None:
    """Raise CheckpointError where `path` holds weights that only a pickle reader opens."""
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    pickled = [file.name for file in found if file.suffix in PICKLES]
    if pickled:
        raise CheckpointError(
            f"{path}: {pickled[0]} is a pickle, which can run code when it is read; load it with "
            "transformers and save it with save_pretrained(safe_serialization=True)"
        )


def _files_of(folder: Path, index: Mapping[str, str]) -> list[Path]:
    """List the files of a folder: those of its index, else the single one."""
    names = sorted(set(index.values())) or [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is half copied: {len(missing)} of {len(names)} files are missing "
            f"({some_of(missing)}); copy them too"
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """Read the index's name → file; empty for a file, and without an index. Raises
    CheckpointError.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError) as failure:
        raise CheckpointError(f"{path} cannot be read: {why(failure)}") from failure
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} has no weight_map; download the folder again")
    strange = [file for file in found.values() if not is_plain_name(file)]
    if strange:
        raise CheckpointError(f"{path} names {strange[0]!r:.100}, which is no file of its folder")
    return found


def _compare(folder: Path, index: Mapping[str, str], file_of: Mapping[str, Path]) -> None:
    """Compare the index with the files. Raises CheckpointError with the first names."""
    missing = [name for name, file in index.items() if file_of.get(name, folder).name != file]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {INDEX} are not in the files that it names "
            f"({some_of(missing)}); download the folder again"
        )


def _facts(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if path.is_file():
        return dict(metadata)
    config = path / CONFIG
    if not config.exists():
        return {}
    try:
        return read_object(config)
    except (OSError, ValueError) as failure:
        raise CheckpointError(f"{config} cannot be read: {why(failure)}") from failure


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the first byte of the data, and the entries by name, once the package has checked
    them.
    """
    from safetensors import safe_open

    try:
        # Whatever else has the name, such as a pipe, would be waited for.
        with open_plain(file) as opened, safe_open(file, framework="pt"):
            (length,) = struct.unpack("<Q", opened.read(8))
            header: dict[str, Any] = json.loads(opened.read(length))
            return 8 + length, header
    except Exception as failure:
        raise CheckpointError(
            f"{file} is no safetensors file, or is damaged: {why(failure)}; download it again"
        ) from failure


def _info(entry: Mapping[str, Any], name: str, file: Path) -> TensorInfo:
    shape, kind = tuple(entry["shape"]), str(entry["dtype"])
    if kind not in DTYPES:
        raise CheckpointError(
            f"{name} in {file} is of type {kind}; this mpillm reads {', '.join(DTYPES)}"
        )
    if math.prod(filter(None, shape)) > LARGEST:
        # Of no bytes where another dim is 0.
        raise CheckpointError(
            f"{name} in {file} has the shape {list(shape)}, too large for any memory; "
            "download it again"
        )
    dtype, itemsize = DTYPES[kind]
    return TensorInfo(dtype, shape, itemsize * whole_box(shape).numel)
