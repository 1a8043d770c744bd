"""`train.keep_zeros`: a pruned model stays pruned in training, whatever a rank holds of it."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.infer.compress.compress_blocks import compressible
from mpillm.infer.compress.compress_model import CompressionRequest, compress_model
from mpillm.infer.compress.compression_method import CompressionOptions
from mpillm.infer.loading import load_trained
from mpillm.train.kept_zeros import KeptZeros
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from tests.infer.compress.small_model import MODEL, QUIET, train_small


@pytest.fixture(scope="module")
def pruned(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Prune a small model; return the folder of pruned/ and data/."""
    folder = shared_folder / "kept"
    train_small(folder, documents, comm, steps=2)
    options = CompressionOptions(pattern="2:4")
    request = CompressionRequest(folder / "run", folder / "pruned", "magnitude", options)
    compress_model(request, comm, QUIET)
    return folder


def zeros_of(run: Path, comm: MPI.Intracomm) -> list[torch.Tensor]:
    layers = compressible(load_trained(run, comm, QUIET).model).values()
    return [layer.weight == 0 for layer in layers]


@pytest.mark.parametrize(("zero", "kept"), [(0, True), (3, True), (0, False)])
def test_zeros_stay_where_they_are(
    pruned: Path, folder: Path, comm: MPI.Intracomm, zero: int, kept: bool
) -> None:
    table = {
        "model": MODEL,
        "data": {"path": str(pruned / "data")},
        "optimizer": {"learning_rate": 0.01},
        "parallel": {"zero": zero},
        "train": {
            "run": str(folder / "run"),
            "start_from": str(pruned / "pruned"),
            "keep_zeros": kept,
            "sinks": [],
            "steps": 2,
            "batch": 12,
        },
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    comm.Barrier()
    before, after = (zeros_of(path, comm) for path in (pruned / "pruned", folder / "run"))
    equal = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert all(equal) if kept else not any(equal)
    assert all(float(each.float().mean()) == 0.5 for each in before)


def test_only_zeros_of_layers_are_kept() -> None:
    stepped = {name: torch.tensor([0.0, 1.0]) for name in ("a.weight", "norm.weight")}
    kept = KeptZeros.of(stepped, ["a", "elsewhere"])
    for weight in stepped.values():
        weight.add_(1)
    kept.restore()
    assert stepped["a.weight"].tolist() == [0.0, 2.0]
    assert stepped["norm.weight"].tolist() == [1.0, 2.0]
