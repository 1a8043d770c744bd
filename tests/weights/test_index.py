"""The index of a checkpoint: whatever is wrong in it is found before a tensor is read by it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError
from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.finding import find, newest_whole
from mpillm.weights.index import overlap
from mpillm.weights.places import CHECKPOINTS, INDEX
from mpillm.weights.saving import save
from mpillm.weights.slices import Box, TensorSlice, all_finite

QUIET = Console(speaks=False)
KEPT = Path(__file__).parent / "data_0_1" / "step-00000004"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save two tensors, one of them in two boxes, and a text."""
    tensor = torch.arange(24.0).reshape(4, 6)
    halves = [TensorSlice(tensor[:, a : a + 3], (0, a), (4, 6)) for a in (0, 3)]
    tensors = {"model/cut": halves, "model/whole": torch.ones(5), "none": torch.empty(0, 2)}
    facts = {"step": 7, "recipe": {"theta": 10000.0, "nan": float("nan"), "tuple": (1, 2)}}
    return save(tmp_path / CHECKPOINTS, tensors, facts, {"words.txt": "é"}, MPI.COMM_SELF)


def contents(checkpoint: Checkpoint) -> tuple[Any, ...]:
    return checkpoint.facts, checkpoint.tensors, checkpoint.text("words.txt")


def test_a_flipped_bit_anywhere_in_the_index_is_found(saved: Path) -> None:
    whole, before = (saved / INDEX).read_bytes(), contents(Checkpoint(saved))
    chance, refused = random.Random(16), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (saved / INDEX).write_bytes(damaged)
        try:
            assert contents(Checkpoint(saved)) == before
        except CheckpointError:
            refused += 1
    # The rest fell on white space.
    assert refused > 100


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index as an earlier release would have written it: without a digest."""
    index = json.loads((folder / INDEX).read_text())
    index.pop("digest", None)
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def cut(index: dict[str, Any]) -> dict[str, Any]:
    return index["tensors"]["model/cut"]["pieces"][0]  # type: ignore[no-any-return]


def whole(index: dict[str, Any]) -> dict[str, Any]:
    return index["tensors"]["model/whole"]["pieces"][0]  # type: ignore[no-any-return]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another step": (lambda i: i["facts"].update(step=8), "its step is 8, the folder's 7"),
    "no step": (lambda i: i["facts"].clear(), "step is None"),
    "a step of a word": (lambda i: i["facts"].update(step="7"), "step is '7'"),
    "a step that is true": (lambda i: i["facts"].update(step=True), "step is True"),
    "facts of a list": (lambda i: i.update(facts=[]), r"facts: \[\] is not an object"),
    "an unknown key": (lambda i: i.update(digesu="0"), "its keys are wrong"),
    "a missing key": (lambda i: i.pop("files"), "its keys are wrong"),
    "a path": (lambda i: cut(i).update(file="../../secret.bin"), "which is not one of this folder"),
    "an absolute path": (lambda i: cut(i).update(file="/etc/passwd"), "not one of this folder"),
    "a hidden file": (lambda i: cut(i).update(file="."), "not one of this folder"),
    "a path in files": (lambda i: i["files"].update({"a/b": 1}), "not one of this folder"),
    "a path in hashes": (lambda i: i["hashes"].update({"../a": "0" * 32}), "not one of this"),
    "an unlisted file": (lambda i: cut(i).update(file="other.h5"), "ends after other.h5"),
    "a negative size": (lambda i: i["files"].update({"rank-00000.h5": -1}), "is -1 and not"),
    "a size of a word": (lambda i: i["files"].update({"rank-00000.h5": "9"}), "is '9' and not"),
    "a negative offset": (lambda i: whole(i).update(offset=-8), "is -8 and not a number"),
    "an offset after the end": (lambda i: whole(i).update(offset=1 << 40), "ends after rank-"),
    "bytes of another count": (lambda i: whole(i).update(nbytes=16), "16 bytes for 5 elements"),
    "a run after the end": (lambda i: whole(i).update(first=1), "ends after its 5 elements"),
    "a missing piece": (
        lambda i: i["tensors"]["model/cut"]["pieces"].pop(),
        "have 12 of its 24 elements",
    ),
    "a piece twice": (
        lambda i: i["tensors"]["model/cut"]["pieces"].append(cut(i)),
        "have 36 of its 24 elements",
    ),
    "pieces that overlap": (lambda i: cut(i).update(start=[0, 2]), "overlap"),
    "a box outside": (lambda i: cut(i).update(start=[0, 4]), "outside of its shape"),
    "a box of other dims": (lambda i: cut(i).update(start=[0]), "outside of its shape"),
    "a short hash": (lambda i: whole(i).update(xxh3_128="12"), "the hash of model/whole is"),
    "an unknown type": (
        lambda i: i["tensors"]["model/whole"].update(dtype="float31"),
        "no type of tensors",
    ),
    "an attribute of torch": (
        lambda i: i["tensors"]["model/whole"].update(dtype="nn"),
        "no type of tensors",
    ),
    "a shape of 2^60": (
        lambda i: i["tensors"]["model/whole"].update(shape=[1 << 40, 1 << 40]),
        "too large for any memory",
    ),
    "a negative shape": (
        lambda i: i["tensors"]["model/whole"].update(shape=[-5]),
        "is -5 and not a number",
    ),
    "a shape of a number": (
        lambda i: i["tensors"]["model/whole"].update(shape=5),
        "is 5 and not a list",
    ),
    "no pieces": (lambda i: i["tensors"]["model/whole"].update(pieces=None), "and not a list"),
    "a tensor of a number": (lambda i: i["tensors"].update({"model/whole": 3}), "not an object"),
    "another digest": (lambda i: i.update(digest="0" * 32), "its digest differs"),
    "another version": (lambda i: i.update(version=9), "this mpillm reads"),
    "a version of a list": (lambda i: i.update(version=[1]), "this mpillm reads"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_wrong_entry_is_named(saved: Path, name: str) -> None:
    change, words = DAMAGE[name]
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(saved)


@pytest.mark.parametrize(
    "text", ["", "null", "3", "[]", "{}", "{", "[" * 100_000, "9" * 5000, "\udcff", "\0"]
)
def test_an_index_that_is_none(saved: Path, text: str) -> None:
    (saved / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(saved)


def test_an_index_without_a_digest_is_read_as_before(saved: Path) -> None:
    before = contents(Checkpoint(saved))
    rewrite(saved, lambda index: index.pop("hashes"))
    checkpoint = Checkpoint(saved)
    assert contents(checkpoint) == before
    assert not checkpoint.has_digest
    assert not Checkpoint(KEPT).has_digest


def test_a_damaged_text_is_found(saved: Path) -> None:
    (saved / "words.txt").write_text("è", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"words\.txt is damaged: its hash differs"):
        Checkpoint(saved).text("words.txt")
    with pytest.raises(CheckpointError, match=r"words\.txt is damaged"):
        Checkpoint(saved).verify()


def test_a_checkpoint_with_a_damaged_text_is_passed_over(folder: Path, comm: MPI.Intracomm) -> None:
    """Rank 0 alone reads the text."""
    for step in (1, 2):
        save(folder / CHECKPOINTS, {"a": torch.ones(3)}, {"step": step}, {"t.txt": "x"}, comm)
    comm.Barrier()
    if comm.rank == 0:
        (folder / CHECKPOINTS / "step-00000002/t.txt").write_text("y")
    comm.Barrier()
    found = newest_whole(folder, comm, QUIET)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_passed_over_and_never_loaded(
    folder: Path, comm: MPI.Intracomm, value: float, dtype: torch.dtype
) -> None:
    for step, last in ((1, 0.0), (2, value)):
        tensor = torch.zeros(40, dtype=dtype)
        tensor[-1] = last
        path = save(folder / CHECKPOINTS, {"model/w": tensor}, {"step": step}, {}, comm)
    found = newest_whole(folder, comm, QUIET)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match=r"model/w in .* holds NaN or an infinity"):
        find(path, comm, QUIET).load({"model/w": torch.zeros(40, dtype=dtype)})


def test_large_finite_values_are_finite() -> None:
    assert all_finite(torch.full((100,), 3e38))
    assert not all_finite(torch.tensor([3e38, float("inf")]))
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))


def test_a_renamed_checkpoint_is_not_the_newest(folder: Path, comm: MPI.Intracomm) -> None:
    """A copy of step 1 named step 9: its own step says which it is."""
    one = save(folder / CHECKPOINTS, {"a": torch.ones(3)}, {"step": 1}, {}, comm)
    comm.Barrier()
    if comm.rank == 0:
        shutil.copytree(one, folder / CHECKPOINTS / "step-00000009")
    comm.Barrier()
    found = newest_whole(folder, comm, QUIET)
    assert found is not None
    assert found.folder == one


def test_a_check_may_refuse_the_newest(folder: Path, comm: MPI.Intracomm) -> None:
    for step in (1, 2):
        save(folder / CHECKPOINTS, {"a": torch.ones(3)}, {"step": step}, {}, comm)

    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.step == 2:
            raise CheckpointError("it lacks a tensor")

    found = newest_whole(folder, comm, QUIET, check)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match="lacks a tensor"):
        find(folder / CHECKPOINTS / "step-00000002", comm, QUIET, check)


def test_boxes_that_overlap() -> None:
    grid = [Box((r, c), (2, 3)) for r in (0, 2, 4) for c in (0, 3)]
    assert not overlap(grid)
    assert overlap([*grid, Box((3, 2), (1, 1))])
    assert not overlap([Box((), ())])
    assert overlap([Box((), ()), Box((), ())])
    assert not overlap([Box((0,), (0,)), Box((0,), (4,))])
    many = [Box((0, c), (9, 1)) for c in range(3000)]
    assert not overlap(many)
    assert overlap([*many, Box((8, 1500), (1, 1))])
