"""Finding the checkpoint that is meant: a folder of its own, or the newest whole one of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.agreement import on_root
from mpillm.errors import CheckpointError
from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS, INDEX

if TYPE_CHECKING:
    from mpi4py import MPI


def newest_whole(run: Path, comm: "MPI.Intracomm", console: Console) -> Checkpoint | None:
    """The newest checkpoint of the run whose every byte is as its index says; None if the run has none at all.

    Every rank calls it; rank 0 looks and tells, so that all take the same one. A damaged checkpoint is passed over
    with a warning. Raises CheckpointError when there are checkpoints but none is whole: a run never starts anew
    without being asked to.
    """
    found = on_root(comm, lambda: _newest_whole(run / CHECKPOINTS, console))
    return Checkpoint(found) if found else None


def _newest_whole(folder: Path, console: Console) -> Path | None:
    candidates = sorted(folder.glob("step-*"), reverse=True)
    for candidate in candidates:
        try:
            Checkpoint(candidate).verify()
        except CheckpointError as failure:
            console.warn(f"passing over a checkpoint that is not whole: {failure}")
        else:
            return candidate
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole; restore one from a backup, "
            f"or remove the folder to begin anew"
        )
    return None


def find(path: Path, comm: "MPI.Intracomm", console: Console) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one if `path` is a run's folder. Every rank calls it.

    Raises CheckpointError when there is none.
    """
    if (path / INDEX).exists():
        return Checkpoint(path)
    checkpoint = newest_whole(path, comm, console) if path.is_dir() else None
    if checkpoint is None:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; name a run's folder (with {CHECKPOINTS}/ in it) or one checkpoint (…/step-00001000)"
        )
    return checkpoint
