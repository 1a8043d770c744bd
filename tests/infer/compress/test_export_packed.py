"""Codes in the format of compressed-tensors: they come back, and its own library reads the same."""

import json
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, UsageError
from mpillm.infer.compress.compress_model import CompressionRequest, compress_model
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.export_model import export_model
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.models.layers.stored.stored_codes import Grid, StoredFormat
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.gguf_writing import stored_values
from mpillm.weights.packed.packed_format import (
    CODES,
    SCALE,
    SHAPE,
    ZERO,
    packed_config,
    packed_tensors,
    read_packed_config,
    unpacked,
)
from tests.infer.compress.small_model import QUIET

FORMATS = [StoredFormat(8), StoredFormat(8, activations=True), StoredFormat(4, 32)]


@pytest.mark.parametrize("method", ["rtn-int8", "rtn-int4", "smoothquant"])
def test_the_codes_come_back(small: Path, folder: Path, comm: MPI.Intracomm, method: str) -> None:
    options = CompressionOptions(group=32)
    request = CompressionRequest(small / "run", folder / "out", method, options, None, 8, 8)
    compress_model(request, comm, QUIET)
    made = export_model(folder / "out", folder / "hub", "compressed-tensors", "auto", comm, QUIET)
    comm.Barrier()
    import_model(folder / "hub", folder / "again", comm, QUIET)
    ours = CheckpointSource(load_trained(folder / "out", comm, QUIET).checkpoint)
    theirs = CheckpointSource(load_trained(folder / "again", comm, QUIET).checkpoint)
    for name in ours.weights:
        found, expected = theirs.read_weight(name), ours.read_weight(name).float()
        # Embeddings and heads are plain values in bfloat16.
        far = 2**-8 if not name.startswith("layers.") else 1e-6
        torch.testing.assert_close(found, expected, rtol=far, atol=0)
    assert made.nbytes < 0.5 * 4 * sum(value.nbytes for value in ours.tensors.values())
    # Exported again, the plain values are no longer named as codes.
    export_model(folder / "again", folder / "plain", "hf", "float32", comm, QUIET)
    comm.Barrier()
    assert "quantization_config" not in json.loads((folder / "plain" / "config.json").read_text())


def test_a_plain_model_has_no_codes_to_export(
    small: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    with pytest.raises(UsageError, match="has no stored layers"):
        export_model(small / "run", folder / "x", "compressed-tensors", "auto", comm, QUIET)
    with pytest.raises(UsageError, match="leave --dtype float16 out"):
        export_model(small / "run", folder / "x", "compressed-tensors", "float16", comm, QUIET)


@pytest.mark.parametrize("layout", FORMATS)
def test_the_library_of_the_format_reads_the_same(layout: StoredFormat) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    values_OI = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    grid = Grid.of(values_OI, layout)
    stored = grid.store(grid.codes(values_OI))
    config = packed_config(layout, [])
    group = dict(config["config_groups"]["group_0"])
    held = {name[2:]: tensor for name, tensor in packed_tensors("x", stored).items()}
    reader = BaseCompressor.get_value_from_registry(config["format"])
    found = reader.decompress(held, QuantizationScheme(**group))["weight"]
    torch.testing.assert_close(found.float(), stored.decoded(), rtol=2**-7, atol=1e-3)
    assert read_packed_config({"quantization_config": config}) == layout


@pytest.mark.parametrize("layout", FORMATS)
def test_tensors_mean_the_values_of_the_codes(layout: StoredFormat) -> None:
    values_OI = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    grid = Grid.of(values_OI, layout)
    stored = grid.store(grid.codes(values_OI))
    tensors = {name[1:]: tensor for name, tensor in packed_tensors("x", stored).items()}
    assert set(tensors) == (
        {".weight", SCALE}
        if layout.activations
        else {CODES, SCALE, SHAPE, *([ZERO] if layout.bits == 4 else [])}
    )
    assert torch.equal(unpacked(tensors, (20, 64), layout), stored.decoded())


def test_other_formats_are_refused_by_name() -> None:
    assert read_packed_config({}) is None
    for config in ({"quant_method": "gptq"}, {**packed_config(StoredFormat(8), []), "format": "x"}):
        with pytest.raises(CheckpointError, match="which is not read"):
            read_packed_config({"quantization_config": config})


def test_codes_stay_in_a_gguf_file() -> None:
    """In Q4_1 the values of int4 codes are not rounded again; others are by the library."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_1
    values_OI = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)) + 0.2
    values_OI[2] = 0
    grid = Grid.of(values_OI, StoredFormat(4, 64))
    codes_OI = grid.codes(values_OI)
    # A block with a part of the 16 values.
    codes_OI[5, :32] = codes_OI[5, :32].clamp(6, 9)
    decoded = grid.values(codes_OI)
    kept = torch.from_numpy(gguf.quants.dequantize(stored_values("x", decoded, "Q4_1"), kind))
    library = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(decoded.numpy(), kind), kind)
    )
    # Scales and lowest values in float16 have 11 significant bits.
    assert (kept - decoded).abs().max() < 0.002
    assert (library - decoded).abs().max() > 0.02
    plain = stored_values("x", values_OI, "Q4_1")
    assert (plain == gguf.quants.quantize(values_OI.numpy(), kind)).all()
