"""What is in `checkpoints/` and is no checkpoint of ours is never removed, renamed or written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpillm.errors import CheckpointError, UsageError
from mpillm.system.console import Console
from mpillm.weights import saving
from mpillm.weights.finding import newest_whole
from mpillm.weights.leftovers import MARKER, is_own, remove_leftovers, temporary_folder
from mpillm.weights.places import INDEX, checkpoint_folders, step_of
from mpillm.weights.saving import prune, save

QUIET = Console(speaks=False)


def write(folder: Path, *steps: int) -> Path:
    for step in steps:
        path = save(
            folder, {"a": torch.ones(9)}, {"step": step}, {"tokenizer.json": "{}"}, MPI.COMM_SELF
        )
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "step-best", "step-7", "step-00000007.keep", "step-00000007.tar", ".step-00000007",
        "step-000000007", "step-٠٠٠٠٠٠٠٧", "Step-00000007", "step-00000007 ", "step-00000007\n",
    ],
)  # fmt: skip
def test_other_names_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    newest = write(tmp_path, 2, 4)
    shutil.copytree(newest, tmp_path / name)
    assert step_of(tmp_path / name) is None
    assert list(checkpoint_folders(tmp_path)) == [2, 4]
    write(tmp_path, 6)
    prune(tmp_path, 1, {2, 4, 6})
    assert names(tmp_path) == sorted(["step-00000006", name])
    assert names(tmp_path / name) == names(tmp_path / "step-00000006")


def test_a_link_in_a_circle_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("step-00000001", "notes"):
        (tmp_path / name).symlink_to(tmp_path / name)
    assert checkpoint_folders(tmp_path) == {}


def test_a_run_that_was_moved_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        write(tmp_path / "run/checkpoints", 1)
    assert names(tmp_path) == []


def test_steps_from_10_to_the_8_have_more_digits(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999, 100_000_000)
    assert list(checkpoint_folders(tmp_path)) == [99_999_999, 100_000_000]


def test_files_links_and_folders_of_a_user_are_not_pruned(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 8, 9)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000001").rename(tmp_path / "elsewhere/step-00000001")
    (tmp_path / "step-00000001").symlink_to(tmp_path / "elsewhere/step-00000001")
    (tmp_path / "step-00000002/notes.txt").write_text("mine")
    (tmp_path / "step-00000003").write_text("a file")
    (tmp_path / ".trash-step-00000004").mkdir()
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005/model.gguf").write_text("mine")
    before = names(tmp_path)
    assert prune(tmp_path, 1, {1, 2, 8, 9}) == []
    assert names(tmp_path) == [name for name in before if name != "step-00000008"]
    assert (tmp_path / "step-00000002/notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere/step-00000001" / INDEX).exists()


def test_what_was_just_written_stays_though_a_newer_one_is_there(tmp_path: Path) -> None:
    """The newest is damaged, the run continued from the one before and keeps one."""
    newer = write(tmp_path, 2, 4, 6)
    data = bytearray((newer / "rank-00000.h5").read_bytes())
    data[-1] ^= 1
    (newer / "rank-00000.h5").write_bytes(data)
    write(tmp_path, 5)
    prune(tmp_path, 1, {4, 5})
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "step-00000004" / INDEX).write_text("{")
    (tmp_path / "step-00000003/rank-00000.h5").write_bytes(b"")
    prune(tmp_path, 2, {1, 2, 5})
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4, 5)]
    write(tmp_path, 6)
    prune(tmp_path, 2, {1, 2, 5, 6})
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_what_was_passed_over_never_counts(tmp_path: Path) -> None:
    """Its sizes are right and a bit is wrong: the job restored the one before, and saves on."""
    write(tmp_path, 2, 4, 6, 8)
    prune(tmp_path, 2, {4, 8})
    # Step 6 is not known to be good: the other good one is still 4.
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 6, 8)]


def test_a_kill_at_any_moment_of_a_save_leaves_what_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short at each file operation of the commit, and of the removal of what was left."""

    class Killed(BaseException):
        pass

    for last in range(40):
        folder, calls = tmp_path / str(last), 0
        folder.mkdir()
        originals = {name: getattr(Path, name) for name in ("unlink", "rename", "touch", "rmdir")}
        flushed = saving.flush

        def counted(work: Callable[..., object], limit: int = last) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Killed
                return work(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name, work in originals.items():
                patch.setattr(Path, name, counted(work))
            patch.setattr(saving, "flush", counted(flushed))
            try:
                write(folder, 5)
            except Killed:
                done = False
            else:
                done = True
        remove_leftovers(folder)
        assert names(folder) == (["step-00000005"] if (folder / "step-00000005").exists() else [])
        if done:
            break
    assert done
    assert last > 3


@pytest.mark.parametrize("kind", ["file", "link", "broken link", "folder"])
def test_a_save_replaces_nothing_of_a_user(folder: Path, comm: MPI.Intracomm, kind: str) -> None:
    target = folder / "step-00000003"
    if comm.rank == 0:
        (folder / "mine").mkdir()
        (folder / "mine/text").write_text("mine")
        if kind == "file":
            target.write_text("mine")
        elif kind == "folder":
            shutil.copytree(folder / "mine", target)
        else:
            target.symlink_to(folder / ("mine" if kind == "link" else "nowhere"))
    comm.Barrier()
    with pytest.raises(CheckpointError, match=r"step-00000003 is a.*move it to another folder"):
        save(folder, {"a": torch.ones(9)}, {"step": 3}, {}, comm)
    comm.Barrier()
    assert names(folder) == ["mine", "step-00000003"]
    assert names(folder / "mine") == ["text"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(
    folder: Path, comm: MPI.Intracomm
) -> None:
    for text in ("first", "second"):
        path = save(folder, {"a": torch.ones(9)}, {"step": 3, "note": text}, {}, comm)
        comm.Barrier()
        if comm.rank == 0 and text == "first":
            (path / INDEX).write_text("{")
        comm.Barrier()
    assert names(folder) == ["step-00000003"]
    found = newest_whole(folder.parent, comm, QUIET)
    assert found is None  # the folder is no run: its checkpoints are not in checkpoints/
    assert '"second"' in (path / INDEX).read_text()


def test_leftovers_are_removed_and_others_stay(tmp_path: Path) -> None:
    killed = temporary_folder(tmp_path / "step-00000004")
    (killed / "rank-00000.h5").write_bytes(b"half")
    whole = write(tmp_path, 5)
    trash = tmp_path / f".step-00000002.{'0a' * 8}.trash"
    shutil.copytree(whole, trash)
    kept = [".step-00000001.tmp", f".step-00000003.{'1b' * 8}.tmp", ".trash-step-00000006"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    link = tmp_path / f".step-00000007.{'2c' * 8}.tmp"
    link.symlink_to(whole)
    (tmp_path / f".step-00000008.{'3d' * 8}.tmp").mkdir()
    assert remove_leftovers(tmp_path) == 3
    assert names(tmp_path) == sorted([*kept, link.name, whole.name])
    assert is_own(whole)
    assert remove_leftovers(tmp_path / "nowhere") == 0


def test_temporary_names_cannot_be_predicted(tmp_path: Path) -> None:
    made = [temporary_folder(tmp_path / "step-00000001") for _ in range(2)]
    assert made[0] != made[1]
    assert [names(path) for path in made] == [[MARKER]] * 2


def test_a_guard_keeps_a_save_from_its_end(folder: Path, comm: MPI.Intracomm) -> None:
    def guard() -> None:
        raise UsageError("the run is held by another job")

    with pytest.raises(UsageError, match="held by another job"):
        save(folder, {"a": torch.ones(9)}, {"step": 3}, {}, comm, guard)
    comm.Barrier()
    assert names(folder) == []
