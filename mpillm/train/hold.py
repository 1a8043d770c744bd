"""The hold of a job on its run: taken first, given back last, and known when it is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import AGREEMENT_SECONDS, on_root
from mpillm.comm.waiting import patient_barrier, wait_patiently
from mpillm.errors import StoppedError
from mpillm.launch.current_job import CurrentJob
from mpillm.runs.lock import LostLockError, RunLock
from mpillm.system.atomic import make_folder
from mpillm.weights.leftovers import remove_leftovers
from mpillm.weights.places import CHECKPOINTS

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class Hold:
    """What rank 0 knows of the run's lock; another rank has no lock and never loses it."""

    lock: RunLock | None = None
    on_failure: Callable[[BaseException], None] | None = None
    """Called with the failure of the block, on each rank, once the ranks agree to fail."""

    def is_lost(self) -> bool:
        """Return whether another job holds the run; reads the lock after a pause alone."""
        return self.lock is not None and self.lock.is_lost()

    def refuse_if_lost(self) -> None:
        """Read the lock; raise LostLockError where another job holds the run."""
        if self.lock is not None:
            self.lock.refuse_if_lost()


@contextmanager
def locked_run(folder: Path, comm: "MPI.Intracomm", job: CurrentJob | None) -> Iterator[Hold]:
    """Make the run's folder and keep other jobs from it while the block runs.

    What a killed save left is removed first. When the block fails, the ranks first agree to fail;
    then rank 0 records the failure and gives the lock back while the others wait. So no rank ends
    the job early. Every rank calls it. Raises UsageError where another job holds the run.
    """
    hold = Hold()
    made = on_root(comm, lambda: _take(hold, folder, job))
    private = comm.Dup() if comm.size > 1 else None
    agreed = True
    try:
        yield hold
    except BaseException as failure:
        try:
            agreed = private is None or wait_patiently(private.Ibarrier(), AGREEMENT_SECONDS)
        finally:
            _record(hold, failure)
        raise
    finally:
        if hold.lock is not None:
            hold.lock.release()
        if made:
            # A run that failed before its first step leaves no empty folder.
            with suppress(OSError):
                folder.rmdir()
        if private is not None and agreed:
            patient_barrier(private)
            private.Free()


def _take(hold: Hold, folder: Path, job: CurrentJob | None) -> bool:
    """Make and lock the folder on rank 0; return whether it is new."""
    made = not folder.exists()
    make_folder(folder)
    try:
        hold.lock = RunLock(folder, job)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    remove_leftovers(folder / CHECKPOINTS)
    return made


def _record(hold: Hold, failure: BaseException) -> None:
    stops = isinstance(failure, StoppedError | LostLockError)
    if hold.on_failure is None or stops:
        return
    # Read once more: where another job holds the run, its history is not ours to write.
    if hold.lock is None or not hold.lock.is_lost(fresh=True):
        hold.on_failure(failure)
