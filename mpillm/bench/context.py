"""Hold what every benchmark needs, and describe where and how it was measured."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from mpillm.bench.bench_options import BenchOptions
from mpillm.comm.failure import ranks_text
from mpillm.machine.cluster_profile import Cluster
from mpillm.system.console import Console, counted
from mpillm.system.versions import package_version

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.comm.communicator import Communicator


@dataclass(frozen=True)
class BenchContext:
    """Hold one run of `mpillm bench`: every rank has one, with the same options."""

    options: BenchOptions
    comm: "MPI.Intracomm"
    group: "Communicator"
    console: Console
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why: the same on every rank."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Show `total` rounds of work; the block calls the yielded function after each."""
        with self.console.progress(what, total, "rounds") as progress:
            yield progress.advance


def header(bench: BenchContext, cluster: Cluster, kept: bool) -> dict[str, str]:
    """Describe the job as name → text. Every rank calls it; `kept`: malloc keeps its pages."""
    from mpi4py import MPI

    options = bench.options
    mine = (MPI.Get_processor_name(), os.sched_getaffinity(0))
    placed: list[tuple[str, set[int]]] = bench.comm.allgather(mine)
    hosts: dict[str, int] = {}
    for host, _ in placed:
        hosts[host] = hosts.get(host, 0) + 1
    return {
        "MPI library": f"{cluster.mpi_library} {cluster.mpi_version}",
        "hosts": ", ".join(f"{host} × {count}" for host, count in hosts.items()),
        "processor": f"{cluster.cpu_model}, {cluster.cores_per_node} cores a node",
        "ranks": f"{bench.comm.size} on {counted(len(bench.group.nodes), 'node')}",
        "binding": binding([cores for _, cores in placed], cluster.cores_per_node),
        "threads a rank": str(options.threads),
        "device": options.device,
        "buffers": buffers_text(options, kept),
        "iterations": f"{options.iterations} after {options.warmup} to warm up, interleaved",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "mpillm": package_version("mpillm"),
    }


def binding(cores: list[set[int]], cores_per_node: int) -> str:
    """Describe the binding as `rank 0: 0, rank 1: 1`; unbound ranks may run on every core."""
    if all(len(mask) >= cores_per_node for mask in cores):
        return "none: each rank may run on every core"
    return "; ".join(f"rank {rank}: {cores_text(mask)}" for rank, mask in enumerate(cores))


def cores_text(cores: set[int]) -> str:
    """{0, 1, 2, 5} → `cores 0–2, 5`."""
    return ranks_text(sorted(cores)).replace("rank", "core", 1)


def buffers_text(options: BenchOptions, kept: bool) -> str:
    """Describe the memory of a collective's arrays: a ratio depends on it."""
    where = {
        None: "node-shared for auto and shared, as in training, private for the others",
        True: "node-shared where possible",
        False: "private",
    }[options.node_shared]
    if options.buffers == "fresh":
        age = "fresh: new pages each iteration, page faults are timed; node-shared ones are kept"
    else:
        age = "warm: the same arrays each time" + ("; malloc keeps its pages" if kept else "")
    return f"{age}; {where}; {'in place' if options.in_place else 'out of place'}"
