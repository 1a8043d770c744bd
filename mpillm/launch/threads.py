"""How many threads a rank may use, so that ranks which share cores do not crowd each other.

A core counts once, however many hardware threads it has: torch's matrix products keep its arithmetic units busy from
one thread, and a second only takes turns with it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.launch.launchers import number
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.machine.topology import ROOT, cpu_limit, read_topology

if TYPE_CHECKING:
    from mpi4py import MPI


def fair_threads(masks: Sequence[AbstractSet[int]], me: int, limit: float = math.inf) -> int:
    """The threads due to process `me`, where process i of this node may run on the cores `masks[i]`; at least 1.

    A core that k processes may run on counts 1/k for each of them: right for ranks bound to cores of their own, for
    ranks that float over a whole node, and for anything between. `limit` CPUs' worth of time, which all of them share,
    is parted evenly.
    """
    due = sum(1 / sum(core in mask for mask in masks) for core in masks[me])
    return max(1, int(min(due, limit / len(masks)) + 1e-9))


def allowance(environment: Mapping[str, str], root: Path = ROOT) -> float:
    """The CPUs that the job may use of this node, by its control groups and by Slurm, which need not bind it to them.

    Infinite where neither sets a limit.
    """
    return min(cpu_limit(root), number(environment, "SLURM_CPUS_ON_NODE") or math.inf)


def threads_wish(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS, where the user set it: of nested parallelism the outermost."""
    wish = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wish) if wish.isdigit() and int(wish) else None


def threads_per_rank(
    comm: "MPI.Intracomm", environment: Mapping[str, str], node_map: NodeMap | None = None
) -> int:
    """The threads of this rank: OMP_NUM_THREADS where the user set it, else its fair share of the node's cores.

    Every rank calls it; `node_map`: of `comm`, else MPI is asked.
    """
    node_map = node_map or map_nodes(comm)
    cores: list[set[int]] = comm.allgather(read_topology().cores(os.sched_getaffinity(0)))
    masks = [cores[rank] for rank in node_map.local_ranks(comm.rank)]
    threads = fair_threads(masks, node_map.local_rank(comm.rank), allowance(environment))
    return threads_wish(environment) or threads
