"""How many threads a rank may use, so that ranks which share cores do not crowd each other."""

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


def fair_threads(masks: Sequence[AbstractSet[int]], me: int) -> int:
    """The threads due to process `me`, where process i of this node may run on the cores `masks[i]`; at least 1.

    A core that k processes may run on counts 1/k for each of them: right for ranks bound to cores of their own, for
    ranks that float over a whole node, and for anything between.
    """
    return max(1, int(sum(1 / sum(core in mask for mask in masks) for core in masks[me]) + 1e-9))


def threads_per_rank(comm: "MPI.Intracomm", environment: Mapping[str, str]) -> int:
    """The threads of this rank: OMP_NUM_THREADS where the user set it, else its fair share of the node's cores.

    Every rank calls it.
    """
    from mpi4py import MPI

    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    masks: list[set[int]] = local.allgather(os.sched_getaffinity(0))
    threads = fair_threads(masks, local.rank)
    local.Free()
    wish = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wish) if wish.isdigit() and int(wish) else threads
