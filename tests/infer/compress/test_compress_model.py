"""`mpillm compress`: what is written is what all other verbs read; wrong input is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.comm.failure import on_root
from mpillm.errors import CheckpointError, DataError, MismatchError, UsageError
from mpillm.infer.compress.compress_blocks import compress_blocks, compressible
from mpillm.infer.compress.compress_model import (
    CompressedModel,
    CompressionRequest,
    check_compressible,
    compress_model,
)
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.compress.method_catalog import METHODS, make_method
from mpillm.infer.compress.print_compression import print_compression
from mpillm.infer.export_model import export_model
from mpillm.infer.generate import sample_tokens
from mpillm.infer.import_model import import_model
from mpillm.infer.loading import load_trained
from mpillm.infer.sampling import Sampling
from mpillm.models.classifiers import MLPConfig
from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.layers.stored.stored_linear import StoredLinear
from mpillm.models.part_module import create
from mpillm.system.console import Console
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.saving import save
from tests.infer.compress.small_model import QUIET

BY_32 = CompressionOptions(group=32)


def compress(
    small: Path, out: Path, method: str, comm: MPI.Intracomm, **more: Any
) -> CompressedModel:
    given = {"options": BY_32, "rows": 8, "held_out": 8, **more}
    return compress_model(CompressionRequest(small / "run", out, method, **given), comm, QUIET)


@pytest.mark.parametrize(("method", "share"), [("rtn-int8", 0.3), ("rtn-int4", 0.22)])
def test_the_written_model_is_read_by_all_others(
    small: Path, folder: Path, comm: MPI.Intracomm, method: str, share: float
) -> None:
    made = compress(small, folder / "out", method, comm)
    assert made.after.nbytes < share * made.before.nbytes
    assert made.before.loss is not None
    assert made.after.loss == pytest.approx(made.before.loss, abs=0.2)
    loaded = load_trained(folder / "out", comm, QUIET)
    layers = [module for module in loaded.model.modules() if isinstance(module, StoredLinear)]
    # Seven a block, and the head's.
    assert len(layers) == 2 * 7 + 1
    source = CheckpointSource(loaded.checkpoint)
    assert source.weights == {
        name: tuple(weight.shape)
        for name, weight in load_trained(small / "run", comm, QUIET).model.named_weights()
    }
    # The values are those of the codes in an export, too, and generation runs.
    export_model(folder / "out", folder / "hub", "hf", "float32", comm, QUIET)
    comm.Barrier()
    import_model(folder / "hub", folder / "again", comm, QUIET)
    plain = CheckpointSource(load_trained(folder / "again", comm, QUIET).checkpoint)
    for name in source.weights:
        expected = source.read_weight(name).float()
        torch.testing.assert_close(plain.read_weight(name), expected, rtol=1e-6, atol=0)
    tokens = list(sample_tokens(loaded.model, [5, 6, 7], Sampling(8, temperature=0.0)))
    assert len(tokens) == 8


def test_codes_and_figures_are_printed(
    small: Path, folder: Path, comm: MPI.Intracomm, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compress(small, folder / "out", "rtn-int8", comm)
    for as_json in (False, True):
        console = Console(speaks=comm.rank == 0)
        print_compression(made, folder / "out", as_json, console)
    if comm.rank == 0:
        text = capsys.readouterr().out
        assert "NLL in nats over" in text
        assert '"loss"' in text


Prepare = Callable[[Path], Path]
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a group that divides no row": (
        {"method": "rtn-int4", "options": CompressionOptions(group=64)},
        UsageError,
        "which groups of 64 do not divide; take --group 32",
    ),
    "no such method": ({"method": "rtn-int3"}, UsageError, "did you mean rtn-int"),
    "no data there": (
        {"method": "rtn-int8", "data": Path("nowhere")},
        DataError,
        "nowhere",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_writes_nothing(
    small: Path, folder: Path, comm: MPI.Intracomm, case: str
) -> None:
    given, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        compress(small, folder / "out", comm=comm, **given)
    assert not (folder / "out" / CHECKPOINTS).exists()


def test_a_compressed_model_and_a_full_folder_are_refused(
    small: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    compress(small, folder / "run", "rtn-int8", comm)
    with pytest.raises(MismatchError, match="compressed already, by rtn-int8"):
        compress(folder, folder / "again", "rtn-int8", comm)
    with pytest.raises(UsageError, match="not empty"):
        compress(small, folder / "run", "rtn-int8", comm)


def test_options_are_checked_with_the_way_out() -> None:
    for given, text in (
        ({"group": 48}, "--group 48 is no group"),
        ({"sparsity": 1.0}, "--sparsity 1.0 is a share"),
        ({"pattern": "4:2"}, "--pattern 4:2 means N zeros"),
        ({"alpha": -1.0}, "--alpha -1.0 is a share"),
    ):
        with pytest.raises(UsageError, match=text):
            CompressionOptions(**given)  # type: ignore[arg-type]
    assert CompressionOptions(pattern="2:4").zeros_of() == (2, 4)


def test_a_model_without_data_needs_none_to_be_rounded(
    published: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    import_model(published, folder / "run", comm, QUIET)
    made = compress(folder, folder / "out", "rtn-int8", comm)
    assert made.before.loss is None
    for name, place in METHODS.items():
        if not name.startswith(("rtn", "magnitude")):
            assert place
            with pytest.raises(DataError, match="reads calibration data, and there is none"):
                compress(folder, folder / "other", name, comm)


def test_weights_that_are_not_numbers_are_refused(
    small: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    checkpoint = load_trained(small / "run", comm, QUIET).checkpoint
    source = CheckpointSource(checkpoint)
    tensors = {name: source.read(name) for name in source.tensors if name.startswith("model/")}
    next(iter(tensors.values()))[0, 0] = math.nan
    texts = {name: checkpoint.text(name) for name in checkpoint.texts}
    on_root(comm, lambda: (folder / "run").mkdir())
    save(folder / "run" / CHECKPOINTS, tensors, checkpoint.facts, texts, comm)
    with pytest.raises(CheckpointError, match=r"holds NaN|none of the 1 checkpoints"):
        compress(folder, folder / "out", "rtn-int8", comm)


def test_two_streams_take_methods_without_data(small: Path, comm: MPI.Intracomm) -> None:
    loaded = load_trained(small / "run", comm, QUIET)
    sizes = {"layers": 1, "decoder_layers": 1, "width": 32, "heads": 4, "vocab_size": 50}
    both = replace(loaded, model=create(EncoderDecoderConfig(**sizes), 1))
    with pytest.raises(MismatchError, match="--method wanda follows one stream"):
        check_compressible(both, make_method("wanda", BY_32))
    check_compressible(both, make_method("rtn-int4", BY_32))
    kept = compress_blocks(both.model, make_method("rtn-int4", BY_32), [], comm, QUIET)
    assert set(kept) == set(compressible(both.model))
    plain = replace(loaded, model=create(MLPConfig(vocab_size=50, width=16), 1))
    with pytest.raises(MismatchError, match="without linear layers in blocks"):
        check_compressible(plain, make_method("rtn-int8", BY_32))
