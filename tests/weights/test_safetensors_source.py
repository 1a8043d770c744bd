"""Hugging Face folders and safetensors files: slices as saved, and hostile files refused."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch

from mpillm.errors import CheckpointError
from mpillm.weights.open_source import open_source
from mpillm.weights.safetensors_source import INDEX, SINGLE, SafetensorsSource
from mpillm.weights.slices import Box

safetensors_torch = pytest.importorskip("safetensors.torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {
        str(dtype).removeprefix("torch."): torch.randn(5, 7, generator=generator).mul(9).to(dtype)
        for dtype in DTYPES
    }
    return {**found, "scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in two files with an index, as transformers saves a large model."""
    found = values()
    shares = {"model-1.safetensors": list(found)[:3], "model-2.safetensors": list(found)[3:]}
    for file, names in shares.items():
        safetensors_torch.save_file({name: found[name] for name in names}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {n: file for file, own in shares.items() for n in own}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_boxes_of_all_dtypes_are_what_was_saved(folder: Path) -> None:
    source = SafetensorsSource(folder)
    assert source.facts == {"model_type": "llama"}
    for name, expected in values().items():
        assert source.tensors[name].shape == tuple(expected.shape)
        assert source.tensors[name].nbytes == expected.numel() * expected.element_size()
        found = source.read(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    part = source.read("bfloat16", Box((1, 2), (3, 4)))
    assert torch.equal(part, values()["bfloat16"][1:4, 2:6])
    assert source.elements == sum(tensor.numel() for tensor in values().values())


def test_a_lone_file_has_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    safetensors_torch.save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
    source = SafetensorsSource(path)
    assert (source.facts, source.read("x").tolist()) == ({"format": "pt"}, [1.0, 1.0])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, r"names '../other\.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no file of its folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"half copied: 1 of 1 files.*gone"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "1 tensors of .* are not in the files"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, index: object, words: str) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        SafetensorsSource(folder)


def test_a_name_in_two_files_is_refused(folder: Path) -> None:
    twice = {"float32": torch.ones(1), "bool": torch.ones(1)}
    safetensors_torch.save_file(twice, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"float32 is in model-1\.safetensors and in model-2"):
        SafetensorsSource(folder)


def hostile(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 1 << 62) + b"{}",
        hostile({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]}}),
        hostile({"a": {"dtype": "F32", "shape": [1 << 63], "data_offsets": [0, 16]}}),
        hostile({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
        hostile({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}),
        hostile(
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            }
        ),
    ],
)
def test_a_hostile_header_is_refused_by_its_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file"):
        SafetensorsSource(tmp_path)


def test_a_shape_of_no_bytes_has_a_limit_too(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 63, 0], "data_offsets": [0, 0]}
    (tmp_path / SINGLE).write_bytes(hostile({"a": entry}, b""))
    with pytest.raises(CheckpointError, match=r"a in .* has the shape \[9223372036854775808, 0\]"):
        SafetensorsSource(tmp_path)


def test_damaged_files_never_crash(folder: Path) -> None:
    """Flipped and cut bytes of a header: refused in words, or the tensors have their shapes."""
    path, chance = folder / "model-1.safetensors", random.Random(18)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            source = SafetensorsSource(folder)
            for name, info in source.tensors.items():
                assert tuple(source.read(name).shape) == info.shape
        except CheckpointError:
            refused += 1
    assert refused > 75


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="are missing"):
        SafetensorsSource(tmp_path)


def test_pickles_are_refused(tmp_path: Path, comm) -> None:  # type: ignore[no-untyped-def]
    from mpillm.system.console import Console

    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
            open_source(path, comm, Console(speaks=False))
