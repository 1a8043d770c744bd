"""`mpillm inspect`: figures of tensors and their differences, at any number of ranks."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, UsageError
from mpillm.infer.inspect_weights import print_inspection
from mpillm.system.console import Console
from mpillm.weights import inspection
from mpillm.weights.places import CHECKPOINTS
from mpillm.weights.saving import save

VALUES = torch.arange(-6.0, 18.0).reshape(4, 6)


def saved(folder: Path, comm: MPI.Intracomm, **changed: torch.Tensor) -> Path:
    tensors = {
        "model/a": VALUES,
        "model/b": torch.ones(5, dtype=torch.bfloat16),
        "model/empty": torch.empty(0, 3),
        "optimizer/step": torch.tensor(3),
    }
    tensors |= {f"model/{name}": tensor for name, tensor in changed.items()}
    facts = {
        "step": 7,
        "recipe": {"model": {"architecture": "decoder", "layers": 2, "bias": False}},
    }
    if comm.rank == 0:
        folder.mkdir(exist_ok=True)
    comm.Barrier()
    return save(folder / CHECKPOINTS, tensors, facts, {}, comm)


def printed(comm: MPI.Intracomm, path: Path, *others: Any, as_json: bool = True) -> str:
    stream = io.StringIO()
    other, patterns = others if others else (None, ())
    console = Console(speaks=comm.rank == 0, stream=stream)
    print_inspection(path, other, patterns, as_json, comm, console)
    return str(comm.bcast(stream.getvalue()))


@pytest.mark.parametrize("piece", [5, 1 << 24])
def test_figures_of_a_checkpoint(
    folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """In pieces of 5 elements, which end within rows, and as a whole."""
    monkeypatch.setattr(inspection, "PIECE_ELEMENTS", piece)
    found = json.loads(printed(comm, saved(folder, comm)))
    assert found["facts"] == {"step": 7, "model": {"architecture": "decoder", "layers": 2}}
    assert (found["kind"], found["elements"], found["bytes"]) == ("checkpoint", 30, 24 * 4 + 10 + 8)
    tensor = found["tensors"]["model/a"]
    assert tensor["shape"] == [4, 6]
    assert tensor["norm"] == pytest.approx(float(VALUES.double().norm()), rel=1e-12)
    assert (tensor["largest"], tensor["not_finite"]) == (17.0, 0)
    assert found["tensors"]["model/b"]["norm"] == pytest.approx(math.sqrt(5))
    assert found["tensors"]["model/empty"]["norm"] == 0
    assert list(found["tensors"]) == ["model/a", "model/b", "model/empty", "optimizer/step"]


def test_a_table_of_the_names_that_match(folder: Path, comm: MPI.Intracomm) -> None:
    text = printed(comm, saved(folder, comm), None, ("model/*a",), as_json=False)
    assert "4 × 6" in text
    assert "model/b" not in text
    assert "4 tensors, 30 elements, 114 B" in text
    with pytest.raises(UsageError, match=r"no tensor of .* matches x; its names begin"):
        printed(comm, folder / CHECKPOINTS / "step-00000007", None, ("x",))


def test_differences_are_named(folder: Path, comm: MPI.Intracomm) -> None:
    one = saved(folder / "one", comm)
    moved = VALUES.clone()
    moved[2, 3] += 0.5
    other = saved(folder / "other", comm, a=moved, b=torch.ones(6), c=torch.ones(1))
    assert json.loads(printed(comm, one, one, ()))["equal"]
    found = json.loads(printed(comm, one, other, ()))
    relative = 0.5 / float(VALUES.double().norm())
    assert found["differing"] == {
        "model/a": {"largest": 0.5, "relative": pytest.approx(relative)},
    }
    assert not found["equal"]
    assert found["reshaped"] == {"model/b": [[5], [6]]}
    assert (found["only_in_first"], found["only_in_second"]) == ([], ["model/c"])
    text = printed(comm, one, other, (), as_json=False)
    assert "2 of 3 tensors of both are equal" in text
    assert "model/b: [5] in" in text


def test_what_is_no_source_is_refused(folder: Path, comm: MPI.Intracomm) -> None:
    for path, words in (
        (folder / "nowhere", "does not exist"),
        (folder, "holds no weights; name a run's folder"),
        (folder / "gone.gguf", "does not exist; check the name"),
        (folder / "gone.safetensors", "does not exist; check the name"),
    ):
        with pytest.raises(CheckpointError, match=words):
            printed(comm, path)
