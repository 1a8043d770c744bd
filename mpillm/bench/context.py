"""What each benchmark is handed, and the header that says where and how it was measured."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mpillm.bench.options import BenchOptions
from mpillm.comm.failure import ranks_text
from mpillm.machine.cluster_profile import Cluster
from mpillm.system.console import Console

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.comm.communicator import Communicator


@dataclass(frozen=True)
class BenchContext:
    """One run of `mpillm bench`: every rank has one, with the same options."""

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
        """Show `total` rounds of work; the block is handed what to call after each."""
        with self.console.progress(what, total, "rounds") as progress:
            yield progress.advance


def header(bench: BenchContext, cluster: Cluster, kept: bool) -> dict[str, str]:
    """Fact → text. Every rank calls it; `kept`: whether malloc was told to keep its pages."""
    from mpi4py import MPI

    mine = (MPI.Get_processor_name(), os.sched_getaffinity(0))
    placed: list[tuple[str, set[int]]] = bench.comm.allgather(mine)
    hosts: dict[str, int] = {}
    for host, _ in placed:
        hosts[host] = hosts.get(host, 0) + 1
    return {
        "MPI library": f"{cluster.mpi_library} {cluster.mpi_version}",
        "hosts": ", ".join(f"{host} × {count}" for host, count in hosts.items()),
        "processor": f"{cluster.cpu_model}, {cluster.cores_per_node} cores a node",
        "ranks": f"{bench.comm.size} on {len(bench.group.nodes)} node{'s' * (len(bench.group.nodes) > 1)}",
        "binding": binding([cores for _, cores in placed], cluster.cores_per_node),
        "threads a rank": str(bench.options.threads),
        "device": bench.options.device,
        "buffers": buffers_text(bench.options, kept),
        "iterations": f"{bench.options.iterations} after {bench.options.warmup} to warm up, interleaved",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "mpillm": _version(),
    }


def binding(cores: list[set[int]], cores_per_node: int) -> str:
    """`rank 0: 0, rank 1: 1`; ranks that may run on every core of their node are not bound."""
    if all(len(mask) >= cores_per_node for mask in cores):
        return "none: each rank may run on every core"
    return "; ".join(f"rank {rank}: {cores_text(mask)}" for rank, mask in enumerate(cores))


def cores_text(cores: set[int]) -> str:
    """{0, 1, 2, 5} → `cores 0–2, 5`."""
    return ranks_text(sorted(cores)).replace("rank", "core", 1)


def buffers_text(options: BenchOptions, kept: bool) -> str:
    """Which memory the arrays of a collective lie in, so that a ratio can be judged."""
    where = {
        None: "node-shared for auto and shared, as training keeps its gradients, private for the others",
        True: "node-shared where it can be had",
        False: "private",
    }[options.node_shared]
    if options.buffers == "fresh":
        age = "fresh: new pages each iteration, those of the result faulted in by the clock; node-shared ones are kept"
    else:
        age = "warm: the same arrays each time" + ("; malloc keeps its pages" if kept else "")
    return f"{age}; {where}; {'in place' if options.in_place else 'out of place'}"


def _version() -> str:
    try:
        return version("mpillm")
    except PackageNotFoundError:
        return "not installed"
