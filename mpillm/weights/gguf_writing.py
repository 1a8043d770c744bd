"""Write a GGUF file: rank 0 its header, and each rank tensors at the offsets that it means."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpillm.errors import CheckpointError

# Our names of dtypes → GGUF's type, and its number of a whole file (`general.file_type`).
FILE_TYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "float32": ("F32", 0),
        "float16": ("F16", 1),
        "bfloat16": ("BF16", 32),
        "q8_0": ("Q8_0", 7),
        "q5_1": ("Q5_1", 9),
        "q5_0": ("Q5_0", 8),
        "q4_1": ("Q4_1", 3),
        "q4_0": ("Q4_0", 2),
    }
)
Array = np.ndarray[Any, np.dtype[Any]]
# A block of Q4_1; how many are checked ahead of all others; how far from even steps values in
# float32 may be, in steps.
Q4_1_ELEMENTS, SAMPLED_BLOCKS, EVEN = 32, 64, 1e-3
TINY = np.finfo(np.float32).tiny
# Tensors of 2 dims that llama.cpp reads in float32 alone.
ALWAYS_FLOAT32 = ("position_embd.weight",)


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor in the file: its GGUF type (`Q8_0`), and its bytes from `offset` on."""

    kind: str
    offset: int
    nbytes: int


def begin_gguf(
    path: Path, facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> dict[str, PlacedTensor]:
    """Write the header of a file of `shapes`, and return where each tensor goes.

    `facts`: the metadata; a float is stored as float32, a whole number as uint32. The file has its
    full size at once. Raises OSError.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    rest = dict(facts)
    writer = GGUFWriter(path, rest.pop("general.architecture"))
    for key, value in rest.items():
        _add(writer, key, value)
    kinds = {name: _kind(name, shape, dtype) for name, shape in shapes.items()}
    sizes = {}
    for name, shape in shapes.items():
        kind = GGMLQuantizationType[kinds[name]]
        elements, nbytes = GGML_QUANT_SIZES[kind]
        sizes[name] = int(np.prod(shape)) // elements * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    placed, pad, alignment = {}, GGUFWriter.ggml_pad, writer.data_alignment
    offset = pad(path.stat().st_size, alignment)
    for name, nbytes in sizes.items():
        placed[name] = PlacedTensor(kinds[name], offset, nbytes)
        offset = pad(offset + nbytes, alignment)
    os.truncate(path, offset)
    return placed


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return the type of a tensor in a file of `dtype`, as llama.cpp's converter chooses it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name in ALWAYS_FLOAT32:
        return "F32"
    kind = FILE_TYPES[dtype][0]
    # Elements of a row share a scale: a row that is no multiple of a block is not quantised.
    elements, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return kind if shape[-1] % elements == 0 else "F16"


def _kept_codes(values: Array) -> Array | None:
    """Return values as blocks of Q4_1 where each block has at most 16 even steps; else None.

    Those of a model that was compressed to int4 have. The library would take a 15th of each
    block's range for the step, and round such values a second time.
    """
    blocks = values.reshape(-1, Q4_1_ELEMENTS)
    if _steps(blocks[:SAMPLED_BLOCKS]) is None or (steps := _steps(blocks)) is None:
        return None
    low = blocks.min(1, keepdims=True)
    step = (blocks.max(1, keepdims=True) - low) / steps
    codes = ((blocks - low) / np.maximum(step, TINY)).round().clip(0, 15).astype(np.uint8)
    halves = codes.reshape(-1, 2, Q4_1_ELEMENTS // 2)
    ends = [each.astype(np.float16).view(np.uint8) for each in (step, low)]
    packed = np.concatenate([*ends, halves[:, 0] | (halves[:, 1] << 4)], axis=1)
    return packed.reshape(*values.shape[:-1], -1)


def _steps(blocks: Array) -> Array | None:
    """Return how many even steps each block has, (n, 1); None where one has none."""
    low = blocks.min(1, keepdims=True)
    span = np.maximum(blocks.max(1, keepdims=True) - low, TINY)
    best, steps = np.full_like(low, np.inf), np.ones_like(low)
    for count in range(1, 16):
        places = (blocks - low) / (span / count)
        error = np.abs(places - places.round()).max(1, keepdims=True)
        # Of several even grids the first, of fewest steps.
        better = error < best - EVEN
        best, steps = np.where(better, error, best), np.where(better, count, steps)
    return None if (best > EVEN).any() else steps


def stored_values(name: str, values: Tensor, kind: str) -> Array:
    """Return the values as a file has them in the GGUF type `kind`.

    Raises CheckpointError where a value is too large for it.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "BF16":
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if kind == "F16":
        half = values.to(torch.float16)
        if not half.isfinite().all():
            raise CheckpointError(
                f"{name} has values beyond 65504, the largest of float16; take --dtype bfloat16"
            )
        return half.contiguous().numpy()
    plain = values.to(torch.float32).contiguous().numpy()
    if kind == "Q4_1" and (kept := _kept_codes(plain)) is not None:
        return kept
    found: Array = plain if kind == "F32" else quantize(plain, GGMLQuantizationType[kind])
    return found
