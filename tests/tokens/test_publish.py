"""--overwrite removes what the manifest lists, and nothing else."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import DataError, UsageError
from mpillm.system.console import Console
from mpillm.tokens import prepare as preparing
from mpillm.tokens import publish as room
from mpillm.tokens.manifest import Manifest
from mpillm.tokens.prepare import PrepareOptions, prepare
from mpillm.tokens.verify import verify

QUIET = Console(False)


@pytest.fixture
def options(folder: Path, comm: MPI.Intracomm) -> PrepareOptions:
    """A dataset of several shards is prepared in folder/out with these options."""
    if comm.rank == 0:
        (folder / "texts").mkdir()
        for number in range(30):
            (folder / "texts" / f"{number}.txt").write_text(f"document {number}\n" * 50)
    comm.Barrier()
    options = PrepareOptions((str(folder / "texts"),), folder / "out", "bytes", shard_bytes=4096)
    prepare(options, comm, QUIET)
    return options


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_else_is_in_the_folder_stays(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm
) -> None:
    """A run, notes, a file that looks like a shard, a link: none is the dataset's."""
    out, said = folder / "out", io.StringIO()
    if comm.rank == 0:
        (out / "runs" / "first").mkdir(parents=True)
        (out / "runs" / "first" / "weights").write_text("hours")
        (out / "train-99999.h5").write_text("mine")
        (out / "notes.md").write_text("mine")
        (out / "link").symlink_to(folder / "texts")
    comm.Barrier()
    console = Console(comm.rank == 0, said)
    made = prepare(replace(options, shard_bytes=1 << 20, overwrite=True), comm, console)
    verify(out, comm, QUIET)
    assert len(made.splits["train"].shards) == 1
    if comm.rank == 0:
        kept = ["link", "notes.md", "runs", "train-99999.h5"]
        assert f"also holds {', '.join(kept)}: kept as it was" in said.getvalue()
        assert sorted(p.name for p in out.iterdir()) == sorted([*kept, *made.files])
        assert (out / "runs" / "first" / "weights").read_text() == "hours"
        assert len(list((folder / "texts").iterdir())) == 30
    assert sorted(path.name for path in folder.iterdir()) == ["out", "texts"]
    comm.Barrier()


@pytest.mark.parametrize(
    "text", ['{"name": "an app"}', "[]", "no json", "[" * 5000, '{"format": "mpillm.tokens"}', None]
)
def test_a_folder_that_is_no_dataset_is_never_touched(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm, text: str | None
) -> None:
    app = folder / "app"
    if comm.rank == 0:
        app.mkdir()
        (app / "train-00000.h5").write_text("mine")
        if text is not None:
            (app / "manifest.json").write_text(text)
    comm.Barrier()
    before = names(folder)
    with pytest.raises(UsageError, match="choose another --out"):
        prepare(replace(options, out=app, overwrite=True), comm, QUIET)
    comm.Barrier()
    assert names(folder) == before
    comm.Barrier()


def test_a_manifest_that_names_other_folders_removes_nothing_there(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.rank == 0:
        (folder / "precious").write_text("mine")
        value = json.loads((folder / "out" / "manifest.json").read_text())
        value["splits"]["train"]["shards"][0]["file"] = "../precious"
        (folder / "out" / "manifest.json").write_text(json.dumps(value))
    comm.Barrier()
    with pytest.raises(UsageError, match=r"which files of .* are its dataset is not known"):
        prepare(replace(options, overwrite=True), comm, QUIET)
    assert (folder / "precious").read_text() == "mine"
    comm.Barrier()


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_of_the_users_is_never_in_the_way(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm, is_folder: bool
) -> None:
    """It has the name of a new shard, and no manifest lists it: found before anything is gone."""
    out = folder / "out"
    prepare(replace(options, shard_bytes=1 << 20, overwrite=True), comm, QUIET)
    if comm.rank == 0:
        mine = out / "train-00001.h5"
        mine.mkdir() if is_folder else mine.write_text("mine")
    comm.Barrier()
    before = names(out)
    with pytest.raises(UsageError, match=r"train-00001\.h5 is not of the dataset that is there"):
        prepare(replace(options, overwrite=True), comm, QUIET)
    assert names(out) == before
    verify(out, comm, QUIET)
    comm.Barrier()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_manifest_is_found_before_the_work(
    options: PrepareOptions,
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    """Not even --overwrite knows which files are the dataset's, so it is no way out."""
    if comm.rank == 0:
        path = folder / "out" / "manifest.json"
        value = json.loads(path.read_text())
        del value["tokenizer"]
        path.write_text(json.dumps(value))
    comm.Barrier()
    if overwrite:
        monkeypatch.setattr(preparing, "survey", lambda *given: pytest.fail("the work began"))
    with pytest.raises(UsageError, match=r"which files of .* are its dataset") as raised:
        prepare(replace(options, overwrite=overwrite), comm, QUIET)
    assert "choose another --out, or remove the folder" in str(raised.value)
    assert "--overwrite" not in str(raised.value)
    comm.Barrier()


def test_an_empty_folder_is_filled(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm
) -> None:
    if comm.rank == 0:
        (folder / "empty").mkdir()
        (folder / "link").symlink_to(folder / "empty")
    comm.Barrier()
    prepare(replace(options, out=folder / "link"), comm, QUIET)
    verify(folder / "empty", comm, QUIET)
    assert (folder / "link").is_symlink()
    comm.Barrier()


def test_the_first_of_two_stays(options: PrepareOptions, folder: Path, comm: MPI.Intracomm) -> None:
    """Where neither job saw the other, the second renames nothing."""
    if comm.rank == 0:
        prepare(replace(options, out=folder / "second", seed=5), MPI.COMM_SELF, QUIET)
        assert not room.publish(folder / "second", folder / "out", False, print)
        assert Manifest.load(folder / "out").prep["seed"] == 0
        verify(folder / "second", MPI.COMM_SELF, QUIET)
    comm.Barrier()


def test_a_job_that_is_killed_while_it_replaces(
    options: PrepareOptions, folder: Path, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reader takes the mixture, and --overwrite replaces it."""
    if comm.rank == 0:
        out, second = folder / "out", folder / "second"
        prepare(replace(options, out=second, seed=5), MPI.COMM_SELF, QUIET)
        replace_file, moved = Path.replace, []

        def die(self: Path, target: Path) -> Path:
            if self.parent == second and len(moved) == 2:
                raise KeyboardInterrupt
            moved.extend([self] if self.parent == second else [])
            return replace_file(self, target)

        monkeypatch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            room.publish(second, out, True, print)
        monkeypatch.undo()
        with pytest.raises(DataError, match="was being replaced when its job ended"):
            Manifest.load(out)
        prepare(replace(options, seed=9, overwrite=True), MPI.COMM_SELF, QUIET)
        made = verify(out, MPI.COMM_SELF, QUIET)
        assert sorted(path.name for path in out.iterdir()) == sorted(made.files)
    comm.Barrier()
