"""GGUF files: each type as the package gguf writes it, boxes, and hostile headers refused."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mpillm.errors import CheckpointError
from mpillm.weights.gguf_source import GgufSource
from mpillm.weights.slices import Box

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 6, 64
# The largest error of a value, over the largest of its block.
QUANTISED = {"Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 2 / 15, "Q5_1": 2 / 31, "BF16": 1 / 256}


def matrix() -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    return np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("a model")
    writer.add_context_length(128)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "b"])
    values = matrix()
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    writer.add_tensor("vector", values[0])
    for name in QUANTISED:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_values_shapes_and_metadata(path: Path) -> None:
    source = GgufSource(path)
    assert source.facts["general.name"] == "a model"
    assert source.facts["llama.context_length"] == 128
    assert source.array("tokenizer.ggml.tokens") == ["a", "é", "b"]
    assert source.array("no such") == []
    values = torch.from_numpy(matrix())
    assert torch.equal(source.read("plain"), values)
    assert torch.equal(source.read("half"), values.half())
    assert source.tensors["vector"].shape == (COLUMNS,)
    assert torch.equal(source.read("vector", Box((3,), (9,))), values[0, 3:12])
    for name, error in QUANTISED.items():
        found = source.read(name)
        assert (found.dtype, source.tensors[name].dtype) == (torch.float32, name)
        assert float((found - values).abs().max()) < error * float(values.abs().max())
        part = source.read(name, Box((2, 5), (3, 40)))
        assert torch.equal(part, found[2:5, 5:45])


def header(tensors: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGML", "does not begin with GGUF"),
        (header(0, 0, version=9), "it is of version 9"),
        (header(1 << 60, 0), "1152921504606846976 tensors"),
        (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)), "an array of 1152921504"),
        (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60)), "an array of 1152921504"),
        (header(0, 1, struct.pack("<Q", 1 << 62) + b"a" * 9), "a text of 46116860184"),
        (header(0, 1, text(b"a") + struct.pack("<I", 77) + b"a" * 9), "the unknown type 77"),
        (header(1, 0, text(b"a") + struct.pack("<I", 99) + b"a" * 99), "a tensor has 99 dims"),
        (header(1, 0, b"\0" * 7), "7 bytes are left"),
        (header(0, 2, 2 * (text(b"a") + struct.pack("<IB", 0, 1))), "it has 'a' twice"),
        (header(1, 0, entry(b"w", (1 << 63, 2), 0, 0)), "too large for any memory"),
        (header(1, 0, entry(b"w", (64,), 0, 0)), "'w' ends at byte"),
        (header(1, 0, entry(b"w", (64,), 0, 1 << 62)), "'w' ends at byte"),
        (header(1, 0, entry(b"w", (31,), 8, 0)), "no multiple of Q8_0's 32"),
        (header(1, 0, entry(b"w", (32,), 999, 0)), "'w' has the unknown type 999"),
        (header(2, 0, 2 * entry(b"w", (0,), 0, 0)), "two of its tensors have one name"),
    ],
)
def test_a_hostile_header_is_refused_at_once(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        GgufSource(path)


def test_damaged_headers_never_crash(path: Path) -> None:
    whole, chance, refused = path.read_bytes(), random.Random(18), 0
    for _ in range(150):
        damaged = bytearray(whole)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged[chance.randrange(900)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            source = GgufSource(path)
            for name, info in source.tensors.items():
                assert tuple(source.read(name).shape) == info.shape
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_a_type_that_the_package_cannot_read_is_named(tmp_path: Path) -> None:
    """Q8_K: of products within llama.cpp, and in no file that it writes."""
    kind = gguf.GGMLQuantizationType.Q8_K
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    whole = header(1, 0, entry(b"w", (elements, 2), int(kind), 0))
    path = tmp_path / "x.gguf"
    path.write_bytes(whole + b"\0" * (-len(whole) % 32 + 2 * nbytes))
    with pytest.raises(CheckpointError, match=r"w in .* is quantised as Q8_K, which the package"):
        GgufSource(path).read("w")
