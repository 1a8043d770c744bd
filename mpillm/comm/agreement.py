"""What one rank finds out, all ranks know: its result or its error."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mpillm.comm.waiting import patient_bcast
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

Result = TypeVar("Result")


def on_root(comm: "MPI.Intracomm", work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 while the others sleep; its picklable result, or its MpillmError, comes to every rank.

    Every rank of `comm` calls it. So a mistake that rank 0 sees is raised on all ranks alike.
    """
    result: Result | None = None
    failure: MpillmError | None = None
    if comm.rank == 0:
        try:
            result = work()
        except MpillmError as caught:
            failure = caught
    result, failure = patient_bcast(comm, (result, failure))
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
