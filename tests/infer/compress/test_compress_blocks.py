"""Blocks one after the other: groups of layers, folded factors, and the same codes on any ranks."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.infer.compress.calibration_rows import read_rows, spread
from mpillm.infer.compress.compress_blocks import BlockInputs, compress_blocks, compressible
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.fold_scales import fold_of
from mpillm.infer.compress.input_statistics import group_layers
from mpillm.infer.compress.method_catalog import make_method
from mpillm.infer.loading import Loaded, load_data, load_trained
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.part_module import Fields, PartModule, create
from tests.infer.compress.small_model import QUIET

ALONE = MPI.COMM_SELF
SIZES = {"layers": 2, "width": 32, "heads": 4, "context": 16, "vocab_size": 50}
MODELS = {
    "gated": DecoderConfig(**SIZES, kv_heads=2, hidden=64),
    "all heads": DecoderConfig(**SIZES, hidden=64, norm="rmsnorm1p"),
    "biases": DecoderConfig(
        **SIZES, norm="layernorm", positions="learned", activation="relu", bias=True
    ),
    "experts": DecoderConfig(**SIZES, hidden=64, experts=3, experts_per_token=2),
    "post-norm encoder": EncoderConfig(**SIZES, norm_place="post"),
}
FOLDS = {"gated": 3, "all heads": 4, "biases": 4, "experts": 2, "post-norm encoder": 1}


def rows(spec: object) -> list[Fields]:
    chance = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(50, (2, 12), generator=chance)} for _ in range(3)]


def output(model: PartModule, fields: Fields) -> torch.Tensor:
    """Return the output of the last block."""
    inputs = BlockInputs(model, [fields])
    for number, block in model.numbered_blocks():
        inputs.advance(number, block)
    return inputs._streams[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_folded_factors_leave_the_model_as_it_is(name: str) -> None:
    model, [fields, *_] = create(MODELS[name], 1), rows(MODELS[name])
    expected = output(model, fields)
    layers, folded = compressible(model), 0
    chance = torch.Generator().manual_seed(2)
    inputs = BlockInputs(model, [fields])
    for number, block in model.numbered_blocks():
        own = {each: layer for each, layer in layers.items() if layer in set(block.modules())}
        groups = group_layers(own, lambda n=number, b=block: inputs.run(n, b, 0))
        assert sum(map(len, groups.values())) == len(own)
        for first, names in groups.items():
            fold = fold_of(block, [own[each] for each in names])
            if fold is None:
                continue
            folded += 1
            factor_I = 0.5 + torch.rand(own[first].in_features, generator=chance)
            fold(factor_I)
            for each in names:
                own[each].weight.mul_(factor_I)
        inputs.advance(number, block)
    torch.testing.assert_close(output(model, fields), expected, rtol=1e-4, atol=1e-5)
    assert folded == 2 * FOLDS[name]


@pytest.mark.parametrize("method", ["gptq-int4", "awq-int4", "smoothquant", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["biases", "experts", "post-norm encoder"])
def test_other_architectures_are_compressed_too(name: str, method: str) -> None:
    model = create(MODELS[name], 1)
    made = make_method(method, CompressionOptions(group=32))
    before = {each: layer.weight.clone() for each, layer in compressible(model).items()}
    kept = compress_blocks(model, made, rows(MODELS[name]), ALONE, QUIET)
    assert set(kept) == (set() if made.prunes else set(before))
    for each, layer in compressible(model).items():
        assert layer.weight.isfinite().all()
        assert not torch.equal(layer.weight, before[each])


def test_numbers_of_rows_are_spread() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]


def codes_of(loaded: Loaded, comm: MPI.Intracomm) -> dict[str, torch.Tensor]:
    manifest = load_data(loaded.checkpoint, None)
    given = loaded.task, loaded.model.spec
    batches = read_rows(manifest, "train", *given, 64, comm)
    method = make_method("gptq-int4", CompressionOptions(group=32))
    kept = compress_blocks(loaded.model, method, batches, comm, QUIET)
    return {name: each.plain_codes for name, each in kept.items()}


def test_the_codes_are_those_of_one_rank(small: Path, comm: MPI.Intracomm) -> None:
    """Calibration rows and layers are shared; the codes are at least 99.9% equal."""
    found = codes_of(load_trained(small / "run", comm, QUIET), comm)
    expected = codes_of(load_trained(small / "run", ALONE, QUIET), ALONE)
    assert list(found) == list(expected)
    equal = [(found[name] == expected[name]).flatten() for name in found]
    assert float(torch.cat(equal).float().mean()) >= 0.999
