"""Threads a rank, so that ranks on the same cores are not oversubscribed.

A core counts once, however many hardware threads it has: one thread of torch's matrix products
keeps its arithmetic units busy, and a second only takes turns with it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.launch.current_job import granted_cpus
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.machine.topology import ROOT, cpu_limit, read_topology

if TYPE_CHECKING:
    from mpi4py import MPI


def fair_threads(masks: Sequence[AbstractSet[int]], me: int, limit: float = math.inf) -> int:
    """Return the fair number of threads of process `me`; at least 1.

    Process i of this node may run on the cores `masks[i]`. A core of k processes counts 1/k for
    each: right for bound ranks, for ranks that float over a node, and for anything between. All
    of them share `limit` CPUs' worth of time evenly.
    """
    due = sum(1 / sum(core in mask for mask in masks) for core in masks[me])
    return max(1, int(min(due, limit / len(masks)) + 1e-9))


def allowance(environment: Mapping[str, str], root: Path = ROOT) -> float:
    """Return the CPUs of this node that the job may use by its control groups and its batch system.

    The batch system need not bind the job to them. Infinite where neither sets a limit.
    """
    return min(cpu_limit(root), granted_cpus(environment) or math.inf)


def threads_setting(environment: Mapping[str, str]) -> int | None:
    """Read OMP_NUM_THREADS where the user set it: of nested parallelism the outermost level."""
    setting = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(setting) if setting.isdigit() and int(setting) else None


def threads_per_rank(
    comm: "MPI.Intracomm", environment: Mapping[str, str], node_map: NodeMap | None = None
) -> int:
    """Return the threads of this rank: OMP_NUM_THREADS, else its fair share of the node's cores.

    Every rank calls it; `node_map`: of `comm`, else MPI is asked.
    """
    node_map = node_map or map_nodes(comm)
    cores: list[set[int]] = comm.allgather(read_topology().cores(os.sched_getaffinity(0)))
    masks = [cores[rank] for rank in node_map.local_ranks(comm.rank)]
    threads = fair_threads(masks, node_map.local_rank(comm.rank), allowance(environment))
    return threads_setting(environment) or threads
