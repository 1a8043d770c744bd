"""Checkpoints that mpillm wrote before slices: they still load, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.system import hdf5
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import INDEX
from mpillm.weights.saving import save
from mpillm.weights.slices import Box, TensorSlice, whole_box

KEPT = Path(__file__).parent / "data_0_1" / "step-00000004"


@pytest.fixture
def checkpoint() -> Checkpoint:
    """Open the kept checkpoint: one layer of width 16, written by 2 ranks after 4 steps."""
    return Checkpoint(KEPT)


def empty(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in checkpoint.tensors.items()
    }


def test_its_tensors_have_the_bytes_that_were_hashed(checkpoint: Checkpoint) -> None:
    """The hashes come from the index as it was written, not from this code's reading of it."""
    checkpoint.verify()
    assert checkpoint.step == 4
    index = json.loads((KEPT / INDEX).read_text())
    tensors = empty(checkpoint)
    checkpoint.load(tensors)
    assert "optimizer/exp_avg_sq/layers/0/attention/query/weight" in tensors
    for name, entry in index["tensors"].items():
        [piece] = entry["pieces"]
        assert hdf5.digest(tensors[name].numpy()) == piece["xxh3_128"], name


@pytest.mark.parametrize("verified", [False, True])
def test_slices_of_it_are_read(checkpoint: Checkpoint, verified: bool) -> None:
    name = "model/embedding/weight"
    tensors = empty(checkpoint)
    checkpoint.load(tensors)
    checkpoint.verified = verified
    box = Box((50, 3), (101, 9))
    part = TensorSlice(torch.zeros(box.size), box.start, tuple(tensors[name].shape))
    checkpoint.load({name: part})
    assert torch.equal(part.tensor, tensors[name][box.within(whole_box(part.shape))])


def test_whole_tensors_are_written_as_before(
    checkpoint: Checkpoint, folder: Path, comm: MPI.Intracomm
) -> None:
    """The same tensors at 2 ranks give the same bytes; at any number the same kind of index."""
    tensors = empty(checkpoint)
    checkpoint.load(tensors)
    texts = {"tokenizer.json": checkpoint.text("tokenizer.json")}
    path = save(folder, tensors, checkpoint.facts, texts, comm)
    before, now = (json.loads((where / INDEX).read_text()) for where in (KEPT, path))
    assert now["version"] == 1
    assert list(now["tensors"]) == list(before["tensors"])
    for name, entry in now["tensors"].items():
        assert list(entry["pieces"][0]) == list(before["tensors"][name]["pieces"][0])
    if comm.size == 2:
        # An index has a digest and hashes now, which an earlier mpillm does not read.
        assert {key: now[key] for key in before} == before
        assert set(now) - set(before) == {"digest", "hashes"}
        for file in set(KEPT.iterdir()) - {KEPT / INDEX}:
            written = np.fromfile(path / file.name, np.uint8)
            assert np.array_equal(written, np.fromfile(file, np.uint8)), file.name
