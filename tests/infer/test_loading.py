"""What a run's checkpoint says of itself is checked before it is believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpillm.errors import CheckpointError, DataError, MismatchError
from mpillm.infer.loading import check_trained, load_data, load_trained
from mpillm.models.model_catalog import read_spec
from mpillm.models.part_module import weight_shapes
from mpillm.system.console import Console
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.train.recipe import parse_recipe
from mpillm.train.setup import train
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS, INDEX

QUIET = Console(speaks=False)


@pytest.fixture(scope="module")
def trained(shared_folder: Path, documents: Path, comm: MPI.Intracomm) -> Path:
    """Train two steps, a checkpoint each; return the folder of run/ and data/."""
    folder = shared_folder / "loading"
    options = PrepareOptions((str(documents),), folder / "data", tokenizer="bytes", validation=0.1)
    prepare(options, comm, QUIET)
    table = {
        "model": {"layers": 2, "width": 16, "heads": 2, "context": 16, "tied": False},
        "data": {"path": str(folder / "data")},
        "train": {
            "run": str(folder / "run"),
            "sinks": [],
            "steps": 2,
            "batch": 12,
            "save_every": 1,
        },
    }
    train(parse_recipe(table, "test"), comm, QUIET)
    comm.Barrier()
    return folder


@pytest.fixture
def run(trained: Path, folder: Path, comm: MPI.Intracomm) -> Path:
    """Copy the trained run, for a test that damages it."""
    if comm.rank == 0:
        shutil.copytree(trained / "run", folder / "run")
    comm.Barrier()
    return folder / "run"


def harm(run: Path, comm: MPI.Intracomm, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest index as an earlier release would have written it."""
    comm.Barrier()
    if comm.rank == 0:
        path = run / CHECKPOINTS / "step-00000002" / INDEX
        index = json.loads(path.read_text())
        index.pop("digest", None)
        change(index)
        path.write_text(json.dumps(index))
    comm.Barrier()


HARMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no recipe": (lambda i: i["facts"].pop("recipe"), "its fact recipe"),
    "a model of a list": (lambda i: i["facts"]["recipe"].update(model=[]), "its fact recipe.model"),
    "no tokenizer": (lambda i: i["facts"].pop("tokenizer"), "its fact tokenizer"),
    "a vocabulary of a word": (
        lambda i: i["facts"]["tokenizer"].update(vocab_size="257"),
        "vocab_size is '257'",
    ),
    "a large vocabulary": (
        lambda i: i["facts"]["tokenizer"].update(vocab_size=258),
        "a tokenizer of 258 tokens and a model of 257",
    ),
    "another tokenizer": (
        lambda i: i["facts"]["tokenizer"].update(sha256="0" * 64),
        "is not the tokenizer that the model was trained with",
    ),
    "a missing weight": (
        lambda i: i["tensors"].pop("model/layers/1/attention/query/weight"),
        "query/weight not at all, its recipe needs",
    ),
    "another width": (
        lambda i: i["facts"]["recipe"]["model"].update(width=32),
        "its recipe needs|asks for",
    ),
    "10^12 tokens": (
        lambda i: i["facts"]["recipe"]["model"].update(vocab_size=10**12),
        "its recipe asks for",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    run: Path, comm: MPI.Intracomm, name: str
) -> None:
    change, words = HARMS[name]
    harm(run, comm, change)
    newest = run / CHECKPOINTS / "step-00000002"
    with pytest.raises(CheckpointError, match=words):
        check_trained(Checkpoint(newest))
    with pytest.raises(CheckpointError, match=words):
        load_trained(newest, comm, QUIET)
    assert load_trained(run, comm, QUIET).checkpoint.step == 1


def test_a_damaged_tokenizer_of_a_checkpoint_is_passed_over(run: Path, comm: MPI.Intracomm) -> None:
    """Where an earlier release wrote no hash, the sha256 among the facts decides."""
    harm(run, comm, lambda index: index.pop("hashes"))
    if comm.rank == 0:
        path = run / CHECKPOINTS / "step-00000002/tokenizer.json"
        # As many bytes: the size is checked first.
        path.write_text(path.read_text().replace("endoftext", "endoftexu"))
    comm.Barrier()
    assert load_trained(run, comm, QUIET).checkpoint.step == 1


def test_settings_of_a_later_release_are_said(run: Path, comm: MPI.Intracomm) -> None:
    path = run / CHECKPOINTS / "step-00000002"
    checkpoint = Checkpoint(path)
    checkpoint.facts["recipe"]["model"]["telepathy"] = 8
    with pytest.raises(MismatchError, match="does not know: telepathy"):
        check_trained(checkpoint)
    with pytest.raises(MismatchError, match="settings that cannot be: width"):
        read_spec({"width": "many"})


def test_another_dataset_at_the_same_place_is_refused(
    run: Path, folder: Path, documents: Path, comm: MPI.Intracomm
) -> None:
    checkpoint = Checkpoint(run / CHECKPOINTS / "step-00000002")
    if comm.rank == 0:
        shutil.copytree(checkpoint.facts["recipe"]["data"]["path"], folder / "data")
    comm.Barrier()
    checkpoint.facts["recipe"]["data"]["path"] = str(folder / "data")
    assert load_data(checkpoint, None).folder == folder / "data"
    other = PrepareOptions((str(documents),), folder / "other", tokenizer="bytes", validation=0.2)
    prepare(other, comm, QUIET)
    comm.Barrier()
    if comm.rank == 0:
        (folder / "data").rename(folder / "before")
        (folder / "other").rename(folder / "data")
    comm.Barrier()
    with pytest.raises(MismatchError, match=r"data is another dataset .*give --data"):
        load_data(checkpoint, None)
    assert load_data(checkpoint, folder / "data") == Manifest.load(folder / "data")


def test_a_dataset_that_is_missing_names_the_folder_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(run / CHECKPOINTS / "step-00000002")
    trained_in = checkpoint.facts["folder"]
    assert trained_in == str(Path.cwd())
    checkpoint.facts["recipe"]["data"]["path"] = "prepared/x"
    monkeypatch.chdir(tmp_path)
    words = f"its path begins in {trained_in}; go there .*`cd .*`.*--data FOLDER"
    with pytest.raises(DataError, match=words):
        load_data(checkpoint, None)
    del checkpoint.facts["folder"]
    with pytest.raises(DataError, match="its path begins where the run was trained"):
        load_data(checkpoint, None)
    checkpoint.facts["recipe"]["data"]["path"] = str(tmp_path / "x")
    with pytest.raises(DataError, match=r"is missing; restore it.*--data FOLDER"):
        load_data(checkpoint, None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_shapes_by_block_are_those_of_the_whole(tied: bool, layers: int) -> None:
    spec = read_spec({"layers": layers, "width": 16, "heads": 2, "vocab_size": 30, "tied": tied})
    whole = dict(spec.build().named_weights())
    assert weight_shapes(spec) == {
        name: ("float32", tuple(weight.shape)) for name, weight in whole.items()
    }
