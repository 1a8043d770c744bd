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
from mpillm.runs.run_files import refuse_dataset, remove_leftover_files
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
    made: bool = False
    """Whether the run's folder is new."""

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
    hold, private = Hold(), None
    try:
        on_root(comm, lambda: _take(hold, folder, job))
        private = comm.Dup() if comm.size > 1 else None
    except BaseException:
        _give_back(hold, folder)
        raise
    try:
        yield hold
    except BaseException as failure:
        agreed = private is None
        try:
            if private is not None:
                agreed = wait_patiently(private.Ibarrier(), AGREEMENT_SECONDS)
        finally:
            _record(hold, failure)
            _give_back(hold, folder)
            if private is not None and agreed:
                patient_barrier(private)
                private.Free()
        raise
    _give_back(hold, folder)
    if private is not None:
        # On `comm`, for a rank that fails must not meet the others in its agreement.
        patient_barrier(comm)
        private.Free()


def _take(hold: Hold, folder: Path, job: CurrentJob | None) -> None:
    """Make and lock the folder on rank 0, and remove what a killed job left there."""
    refuse_dataset(folder)
    hold.made = not folder.exists()
    make_folder(folder)
    hold.lock = RunLock(folder, job)
    remove_leftover_files(folder)
    remove_leftovers(folder / CHECKPOINTS)


def _give_back(hold: Hold, folder: Path) -> None:
    if hold.lock is not None:
        hold.lock.release()
    if hold.made:
        # A run that failed before its first step leaves no empty folder.
        with suppress(OSError):
            folder.rmdir()


def _record(hold: Hold, failure: BaseException) -> None:
    stops = isinstance(failure, StoppedError | LostLockError)
    if hold.on_failure is None or stops:
        return
    # Read once more: where another job holds the run, its history is not ours to write.
    if hold.lock is None or not hold.lock.is_lost(fresh=True):
        hold.on_failure(failure)
