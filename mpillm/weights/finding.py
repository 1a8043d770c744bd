"""Find the checkpoint that is meant: one by its folder, or the newest whole one of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.comm.waiting import patient_barrier
from mpillm.errors import CheckpointError, MpillmError
from mpillm.system.console import Console
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.places import CHECKPOINTS, INDEX, checkpoint_folders

if TYPE_CHECKING:
    from mpi4py import MPI

Check = Callable[[Checkpoint], object]


def accept(checkpoint: Checkpoint) -> None:
    """Accept each checkpoint that is whole."""


def newest_whole(
    run: Path, comm: "MPI.Intracomm", console: Console, check: Check = accept
) -> Checkpoint | None:
    """Open the newest checkpoint of the run whose every byte matches its index; None without any.

    Every rank calls it and verifies its share of the bytes, and all open the same one. A damaged
    checkpoint is passed over with a warning; so is one that `check`, called on rank 0, refuses by
    CheckpointError. Raises CheckpointError when there are checkpoints but none is whole: a run
    never begins again at step 1 unasked.
    """
    folder = run / CHECKPOINTS
    # Rank 0 lists the folder: another node may see it differently for a moment.
    found = on_root(comm, lambda: list(checkpoint_folders(folder).values()))
    faults = []
    for path in reversed(found):
        checkpoint, fault = _verify(path, comm, check)
        if checkpoint is not None:
            return checkpoint
        console.warn(f"passing over a checkpoint that is not whole: {fault}")
        faults.append(fault)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole "
            f"(the newest: {faults[0]}); "
            "restore one from a backup, or remove the folder to begin at step 1"
        )
    return None


def _verify(path: Path, comm: "MPI.Intracomm", check: Check) -> tuple[Checkpoint | None, str]:
    """Open and verify a checkpoint together; None and the first fault where it is not whole."""
    checkpoint, refusal = None, None
    # A rank that cannot open it reports slice -2, ahead of damaged texts (-1) and slices.
    fault: tuple[int, str] | None
    try:
        checkpoint = Checkpoint(path)
        fault = checkpoint.first_fault(comm.rank, comm.size)
        if comm.rank == 0 and (fault is None or fault[0] >= 0):
            check(checkpoint)
    except CheckpointError as failure:
        fault = (-2, str(failure))
    except MpillmError as failure:
        # Without a digest a wrong bit may be the reason; with one the checkpoint is as written.
        if checkpoint is not None and checkpoint.has_digest:
            refusal = failure
        fault = (-2, f"{path}: {failure}")
    # Shares take unequal time on a busy file system: sleep, don't spin.
    patient_barrier(comm)
    answers = comm.allgather((fault, refusal))
    if refused := next((refusal for _, refusal in answers if refusal), None):
        raise refused
    faults = [found for found, _ in answers if found]
    if faults:
        return None, min(faults)[1]
    assert checkpoint is not None
    checkpoint.verified = True
    return checkpoint, ""


def find(path: Path, comm: "MPI.Intracomm", console: Console, check: Check = accept) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest whole one if `path` is a run's folder.

    `check`: as in `newest_whole`; for a single checkpoint its error is raised. Every rank calls
    it. Raises CheckpointError when there is none.
    """
    if on_root(comm, lambda: _exists(path / INDEX)):
        checkpoint = Checkpoint(path)
        on_root(comm, lambda: check(checkpoint))
        return checkpoint
    found = newest_whole(path, comm, console, check) if path.is_dir() else None
    if found is None:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; name a run's folder (with {CHECKPOINTS}/ in it) "
            "or one checkpoint (…/step-00001000)"
        )
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as failure:
        # A name that is too long, or holds a NUL byte.
        raise CheckpointError(
            f"{path.parent}: {getattr(failure, 'strerror', failure)}; "
            "name a run's folder or a checkpoint"
        ) from failure
