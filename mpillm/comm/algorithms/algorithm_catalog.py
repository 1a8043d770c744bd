"""The table of collective algorithms: name → its Algorithm, one file each.

The executors run any of them, and `package.module:Name` names an Algorithm of a user's own package.
Tests prove every one symbolically for 1 to 64 ranks, without MPI.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType

from mpillm.comm.algorithms.schedule import Algorithm, CollectiveSchedule
from mpillm.errors import CommError
from mpillm.system.plugins import load_plugin

_HERE = "mpillm.comm.algorithms"
# In the order in which users see the algorithms; the first wins a tie of a cluster's profile.
ALGORITHM_CATALOG: Mapping[str, str] = MappingProxyType(
    {
        "ring": f"{_HERE}.ring:RING",
        "recursive-doubling": f"{_HERE}.recursive_doubling:RECURSIVE_DOUBLING",
        "recursive-halving": f"{_HERE}.recursive_halving:RECURSIVE_HALVING",
        "rabenseifner": f"{_HERE}.rabenseifner:RABENSEIFNER",
        "binomial": f"{_HERE}.binomial:BINOMIAL",
        "scatter-allgather": f"{_HERE}.scatter_allgather:SCATTER_ALLGATHER",
        "pairwise": f"{_HERE}.pairwise:PAIRWISE",
    }
)


@cache
def load_algorithm(name: str) -> Algorithm:
    """Load the algorithm `name`, of the catalogue or a plug-in; raises UsageError for one that does
    not exist.
    """
    found = load_plugin(name, ALGORITHM_CATALOG, "collective algorithm")
    if not isinstance(found, Algorithm):
        raise CommError(
            f"{name} is of type {type(found).__name__}; a collective algorithm is an Algorithm of "
            "mpillm.comm.algorithms.schedule"
        )
    return found


@cache
def algorithms_of(operation: str) -> tuple[str, ...]:
    """Return the names of the catalogue's algorithms that can run `operation`."""
    return tuple(name for name in ALGORITHM_CATALOG if operation in load_algorithm(name).rounds)


# Many prepared calls share few schedules, and the time to make one grows with the ranks.
@lru_cache(maxsize=4096)
def schedule(
    operation: str, algorithm: str, rank: int, size: int, root: int = 0
) -> CollectiveSchedule:
    """Return the schedule of `rank` of `size` ranks; `root`: of reduce and broadcast.

    Raises CommError where the algorithm cannot run the operation, UsageError where it does not
    exist.
    """
    found = load_algorithm(algorithm)
    if operation not in found.rounds:
        raise CommError(
            f"{algorithm} cannot run {operation}, only {', '.join(found.rounds)}; "
            f"for {operation} take one of {', '.join(algorithms_of(operation))}"
        )
    return found.schedule(operation, rank, size, root)
