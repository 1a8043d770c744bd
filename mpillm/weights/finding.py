"""Find the checkpoint that is meant: one by its folder, or the newest whole one of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import CheckpointError
from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

if TYPE_CHECKING:
    from mpi4py import MPI


def newest_whole(run: Path, comm: "MPI.Intracomm", console: Console) -> Checkpoint | None:
    """Open the newest checkpoint of the run whose every byte matches its index; None without any.

    Every rank calls it and verifies its share of the bytes, and all open the same one. A damaged
    checkpoint is passed over with a warning. Raises CheckpointError when there are checkpoints but
    none is whole: a run never begins again at step 1 unasked.
    """
    folder = run / CHECKPOINTS
    # Rank 0 lists the folder: another node may see it differently for a moment.
    found = on_root(comm, lambda: list(checkpoint_folders(folder).values()))
    for path in reversed(found):
        checkpoint, fault = _verify(path, comm)
        if checkpoint is not None:
            return checkpoint
        console.warn(f"passing over a checkpoint that is not whole: {fault}")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole; "
            "restore one from a backup, or remove the folder to begin at step 1"
        )
    return None


def _verify(path: Path, comm: "MPI.Intracomm") -> tuple[Checkpoint | None, str]:
    """Open and verify a checkpoint together; None and the first fault where it is not whole."""
    checkpoint = None
    # A rank that cannot open it reports slice -1, ahead of any damaged slice.
    try:
        checkpoint = Checkpoint(path)
        fault = checkpoint.first_fault(comm.rank, comm.size)
    except CheckpointError as failure:
        fault = (-1, str(failure))
    # Shares take unequal time on a busy file system: sleep, don't spin.
    patient_barrier(comm)
    faults = [found for found in comm.allgather(fault) if found]
    if faults:
        return None, min(faults)[1]
    assert checkpoint is not None
    checkpoint.verified = True
    return checkpoint, ""


def find(path: Path, comm: "MPI.Intracomm", console: Console) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest whole one if `path` is a run's folder.

    Every rank calls it. Raises CheckpointError when there is none.
    """
    if (path / INDEX).exists():
        return Checkpoint(path)
    checkpoint = newest_whole(path, comm, console) if path.is_dir() else None
    if checkpoint is None:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; name a run's folder (with {CHECKPOINTS}/ in it) "
            "or one checkpoint (…/step-00001000)"
        )
    return checkpoint
