"""Tensors reach a file piece by piece; a GPU's path is taken with tensors of the host, too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpillm.system import hdf5
from mpillm.weights import checkpoint, host_pieces
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.host_pieces import host_copy
from mpillm.weights.host_pieces import host_pieces as pieces_of
from mpillm.weights.saving import save


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no tensor for one of the host."""
    for module in (host_pieces, checkpoint):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    whole = torch.randn(33, 17, generator=made)
    return {
        "model/a": whole,
        "model/b": whole.t()[:5],
        "model/c": whole.bfloat16(),
        "model/d": torch.zeros(0, 3),
        "model/e": torch.tensor(2.5),
    }


@pytest.mark.parametrize("piece_bytes", [1, 64, 1000, 1 << 20])
def test_the_pieces_are_the_tensor(elsewhere: None, piece_bytes: int) -> None:
    for name, tensor in tensors().items():
        found = [piece.copy().reshape(-1) for piece in pieces_of(tensor, piece_bytes)]
        expected = next(pieces_of(tensor.contiguous().clone(), 1 << 30)).reshape(-1)
        assert np.array_equal(np.concatenate(found), expected), name


def test_a_tensor_of_the_host_is_not_copied() -> None:
    tensor = torch.arange(6.0)
    (piece,) = pieces_of(tensor)
    assert piece.ctypes.data == tensor.data_ptr()
    assert host_copy(tensor) is tensor


def test_a_digest_of_pieces_is_that_of_the_whole() -> None:
    values, digest = np.arange(1000), hdf5.Digest()
    for piece in np.array_split(values, 7):
        digest.add(piece)
    assert digest.text == hdf5.digest(values)


def test_a_checkpoint_of_a_device_is_that_of_the_host(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tensors()
    one = save(folder / "host", given, {"step": 1}, {}, comm)
    with monkeypatch.context() as patch:
        for module in (host_pieces, checkpoint):
            patch.setattr(module, "on_host", lambda tensor: False)
        other = save(folder / "device", given, {"step": 1}, {}, comm)
        restored = {name: torch.full_like(tensor, 7) for name, tensor in given.items()}
        Checkpoint(other).load(restored)
    assert all(restored[name].equal(given[name]) for name in given)
    hashes = [
        {name: [piece.xxh3_128 for piece in entry.pieces] for name, entry in found.tensors.items()}
        for found in (Checkpoint(one), Checkpoint(other))
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_saved_and_filled(
    folder: Path, comm: MPI.Intracomm, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces far smaller than the tensors, so that buffers are filled again while in use."""
    monkeypatch.setattr(host_pieces.host_pieces, "__defaults__", (1 << 16,))
    made = torch.Generator().manual_seed(2)
    given = {**tensors(), "model/large": torch.randn(1000, 1001, generator=made)}
    there = {name: tensor.to(gpu) for name, tensor in given.items()}
    one = save(folder / "host", given, {"step": 1}, {}, comm)
    other = save(folder / "gpu", there, {"step": 1}, {}, comm)
    restored = {name: torch.full_like(tensor, 7) for name, tensor in there.items()}
    Checkpoint(other).load(restored)
    for name, tensor in restored.items():
        assert tensor.device == gpu
        assert tensor.cpu().equal(given[name]), name
    Checkpoint(one).load(there)
    assert all(there[name].cpu().equal(given[name]) for name in given)
