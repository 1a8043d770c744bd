"""Placement of the ranks: host, cores, sockets, threads, GPU; oversubscribed and idle cores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.launch.launchers import detect, launcher_named
from mpillm.launch.threads import allowance
from mpillm.machine.gpus import gpu_of, visible_gpus
from mpillm.machine.node_map import NodeMap, map_nodes
from mpillm.machine.topology import ROOT, job_cpus, ranges_text, read_topology
from mpillm.system.console import Console, counted

if TYPE_CHECKING:
    from mpi4py import MPI

COLUMNS = ("host", "ranks", "local", "cores", "socket", "NUMA", "threads", "GPU")
NONE = "–"


@dataclass(frozen=True)
class RankPlace:
    """The place of one rank: its share of its node."""

    rank: int
    host: str
    local_rank: int
    local_size: int
    cpus: frozenset[int]
    """The hardware threads that it may run on."""
    cores: frozenset[int]
    """Their cores, each named by its lowest CPU."""
    threads: int
    sockets: frozenset[int] = frozenset()
    numa: frozenset[int] = frozenset()
    gpu: str = ""
    """The GPU of its local rank, such as `cuda 2`; "" without any."""
    offered_cores: int = 1
    """The cores that the node offers to all ranks of the job there."""
    limit: float = float("inf")
    """The CPUs' worth of time that all ranks of the job get there."""
    launcher: str = ""
    """Its name in launchers.LAUNCHERS."""


def placement(
    comm: "MPI.Intracomm",
    environment: Mapping[str, str],
    threads: int,
    root: Path = ROOT,
    node_map: NodeMap | None = None,
) -> list[RankPlace]:
    """Gather the place of each rank of `comm`, in their order, on every rank.

    Every rank calls it; `threads` is the number of this rank's threads.
    """
    from mpi4py import MPI

    node_map = node_map or map_nodes(comm)
    local_rank = node_map.local_rank(comm.rank)
    topology, cpus, limit = (
        read_topology(root),
        os.sched_getaffinity(0),
        allowance(environment, root),
    )
    offered = job_cpus(root) or cpus
    mine = RankPlace(
        rank=comm.rank,
        host=MPI.Get_processor_name(),
        local_rank=local_rank,
        local_size=len(node_map.local_ranks(comm.rank)),
        cpus=frozenset(cpus),
        cores=frozenset(topology.cores(cpus)),
        threads=threads,
        sockets=frozenset(topology.sockets(cpus)),
        numa=frozenset(topology.numa_nodes(cpus)),
        gpu=gpu_of(local_rank, visible_gpus(environment, root)),
        offered_cores=cores_within(limit, len(offered), len(topology.cores(offered))),
        limit=limit,
        launcher=detect(environment).launcher,
    )
    return comm.allgather(mine)


def print_placement(
    comm: "MPI.Intracomm",
    environment: Mapping[str, str],
    threads: int,
    console: Console,
    verbose: bool,
    node_map: NodeMap | None = None,
) -> None:
    """Warn of oversubscribed and of idle cores; `verbose`: print the place of each rank.

    Every rank calls it.
    """
    places = placement(comm, environment, threads, node_map=node_map)
    if verbose:
        console.table("placement", COLUMNS, table_rows(places))
    for text in (oversubscription(places), narrow_binding(places)):
        if text:
            console.warn(text)


def cores_within(limit: float, cpus: int, cores: int) -> int:
    """Convert `limit` CPUs into cores of a node that has `cores` with `cpus` hardware threads.

    Returns at least 1.
    """
    return max(1, int(min(cores, limit * cores / cpus)))


def table_rows(places: Sequence[RankPlace]) -> list[tuple[str, ...]]:
    """Write a row for each run of equal ranks, under COLUMNS; equal hosts are shown once."""
    hosts = by_host(places)
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for host, there in hosts.items():
        alike.setdefault(
            tuple((str(place.local_rank), *_cells(place)) for place in there), []
        ).append(host)
    rows = []
    for names in alike.values():
        host = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
        rows += [
            (
                host,
                ranges_text(p.rank for p in run),
                ranges_text(p.local_rank for p in run),
                *_cells(run[0]),
            )
            for run in _runs(hosts[names[0]])
        ]
    return rows


def oversubscription(places: Sequence[RankPlace]) -> str:
    """Write a warning where a host runs more threads than CPUs; "" where each has its own.

    Ranks that wait for a message spin, so a thread without a CPU of its own delays all of them.
    The CPUs are those that the ranks may run on, within the job's limit of CPU time.
    """
    crowds = [crowd for there in by_host(places).values() if (crowd := _worst_crowd(there))]
    if not crowds:
        return ""
    there, cpus, room = max(
        crowds, key=lambda crowd: sum(place.threads for place in crowd[0]) / crowd[2]
    )
    others = f" (and {counted(len(crowds) - 1, 'host')} more like it)" if len(crowds) > 1 else ""
    only = (
        f"{room:g} CPUs' worth of time"
        if room < len(cpus)
        else f"{counted(len(cpus), 'CPU')} ({ranges_text(cpus)})"
    )
    return (
        f"host {there[0].host}{others}: {_ranks(there)} of the job run "
        f"{sum(place.threads for place in there)} threads on {only}, so they wait for each other; "
        f"{_remedies(there, room)}"
    )


def narrow_binding(places: Sequence[RankPlace]) -> str:
    """Write a hint where a host's ranks may run on at most half of the cores offered to the job.

    Returns "" elsewhere. By default Open MPI binds each rank to one core: `mpirun -n 2` leaves 62
    of 64 cores idle.
    """
    idle = [
        there
        for there in by_host(places).values()
        if 2 * _used_cores(there) <= there[0].offered_cores
    ]
    if not idle:
        return ""
    there = max(idle, key=lambda there: there[0].offered_cores / _used_cores(there))
    used, offered = _used_cores(there), there[0].offered_cores
    others = f" (and {counted(len(idle) - 1, 'host')} more like it)" if len(idle) > 1 else ""
    return (
        f"{counted(len(there), 'rank')} on host {there[0].host}{others} may run on {used} of its "
        f"{offered} cores; {_widen(there[0])}"
    )


def by_host(places: Sequence[RankPlace]) -> dict[str, list[RankPlace]]:
    """Group places by host, hosts and places in the order of ranks."""
    hosts: dict[str, list[RankPlace]] = {}
    for place in places:
        hosts.setdefault(place.host, []).append(place)
    return hosts


def _worst_crowd(
    there: Sequence[RankPlace],
) -> tuple[list[RankPlace], frozenset[int], float] | None:
    """Find the most oversubscribed ranks of one host, their CPUs, and how many of those count.

    Returns None if all threads fit. They do when no set of CPUs has more threads of ranks confined
    to it than CPUs (Hall's theorem). The masks of the ranks and their union are the sets to check.
    """
    everything = frozenset[int]().union(*(place.cpus for place in there))
    crowds = []
    for cpus in {everything, *(place.cpus for place in there)}:
        inside = [place for place in there if place.cpus <= cpus]
        room = min(len(cpus), max(1.0, there[0].limit)) if cpus == everything else len(cpus)
        if sum(place.threads for place in inside) > room:
            crowds.append((inside, cpus, room))
    return max(
        crowds, key=lambda crowd: sum(place.threads for place in crowd[0]) / crowd[2], default=None
    )


def _remedies(there: Sequence[RankPlace], room: float) -> str:
    fewer = f"start at most {counted(int(room), 'rank')} there" if len(there) > room else ""
    offered = there[0].offered_cores
    wider = _widen(there[0]) if _used_cores(there) < offered else ""
    fair = max(1, int(room / len(there)))
    threads = f"set OMP_NUM_THREADS={fair}" if any(place.threads > fair for place in there) else ""
    return " or ".join(way for way in (threads, wider, fewer) if way)


def _used_cores(there: Sequence[RankPlace]) -> int:
    return len(frozenset[int]().union(*(place.cores for place in there)))


def _widen(place: RankPlace) -> str:
    """Write the launcher's option that gives each rank of the host its share of the cores."""
    launcher = launcher_named(place.launcher)
    if launcher is None or not launcher.widen:
        return "start with a wider mask (`taskset --pid --cpu-list $$` shows the shell's own)"
    return launcher.widen.format(cores=max(1, place.offered_cores // place.local_size))


def _runs(there: Sequence[RankPlace]) -> list[list[RankPlace]]:
    """Group consecutive places that differ in their ranks alone."""
    runs: list[list[RankPlace]] = []
    for place in there:
        if runs and _cells(runs[-1][0]) == _cells(place):
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _cells(place: RankPlace) -> tuple[str, ...]:
    """Write the columns of a place after its host and ranks."""
    lists = (ranges_text(numbers) or NONE for numbers in (place.cores, place.sockets, place.numa))
    return (*lists, str(place.threads), place.gpu or NONE)


def _ranks(there: Sequence[RankPlace]) -> str:
    return f"{'ranks' if len(there) > 1 else 'rank'} {ranges_text(place.rank for place in there)}"
