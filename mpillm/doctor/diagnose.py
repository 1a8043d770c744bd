"""`mpillm doctor`: alone, or under mpirun, where each host's first rank looks about and rank 0 tells it all.

MPI itself may be what is wrong, and MPI_Init ends a process that it does not like. So a child asks first; processes
that are no job leave with one report, of the first of them.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpillm.doctor import (
    batch_system,
    folders,
    homogeneous,
    host,
    mpi_start,
    reach,
    ring_links,
    shared_folder,
)
from mpillm.doctor.findings import MISSED, Finding, FindingRow, guarded, merge
from mpillm.doctor.findings_report import tell
from mpillm.doctor.host_checks import HostJob, Local, examine, wished_paths
from mpillm.doctor.options import DoctorOptions, Probes
from mpillm.doctor.timed_barrier import meet
from mpillm.errors import LaunchError
from mpillm.launch.current_job import current_job
from mpillm.launch.launchers import Started, detect
from mpillm.launch.placement import narrow_binding, placement
from mpillm.launch.singleton import refuse_before_init, refuse_lonely_ranks, without_foreign_warning
from mpillm.launch.threads import threads_per_rank
from mpillm.machine.node_map import map_nodes
from mpillm.system.console import Console
from mpillm.system.environment import without_launcher
from mpillm.system.pmix import wait_until_all_began

if TYPE_CHECKING:
    from mpi4py import MPI

# A launcher kills the rest once a rank leaves with an error: the first must speak before that.
FIRST_SPEAKS_SECONDS, ABORT_SECONDS = 5.0, 60.0
SITE_VARIABLE = "MPILLM_SITE"
"""launch.site's, which needs packages."""


@dataclass(frozen=True)
class World:
    """The job as MPI has it: all ranks, those of this host, and the name of each rank's host."""

    comm: "MPI.Intracomm"
    node: "MPI.Comm"
    host_of: tuple[str, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.host_of))

    @property
    def host(self) -> str:
        return self.host_of[self.comm.rank]

    @property
    def leads(self) -> bool:
        return self.node.rank == 0


def doctor(
    options: DoctorOptions, console: Console, probes: Probes, environment: Mapping[str, str]
) -> int:
    """Check everything and tell it; the exit code, 1 where there is an error, on every rank.

    Every process calls it, before MPI has been started: MPI may be what ails. `console` speaks on rank 0.
    """
    environment = dict(environment)  # MPI_Init adds to it
    started = detect(environment)
    look = mpi_start.look(without_launcher(environment), start=not started.launcher)
    if refusal := _refusal(environment, started, look):
        return _refuse(refusal, started, options, console)
    if not look.library.name or look.failure:
        return _alone(options, console, probes, environment, look)
    comm = open_quietly()
    try:
        refuse_lonely_ranks(environment, comm.size, look.says)
    except LaunchError as failure:
        return _refuse(mpi_start.judge_start(str(failure), look), started, options, console)
    return _together(comm, options, console, probes, environment, look)


def open_quietly() -> "MPI.Intracomm":
    """MPI_COMM_WORLD. Importing mpi4py.MPI calls MPI_Init."""
    with without_foreign_warning():
        from mpi4py import MPI
    wait_until_all_began(MPI.COMM_WORLD.size)
    return MPI.COMM_WORLD


def _refusal(
    environment: Mapping[str, str], started: Started, look: mpi_start.Look
) -> list[Finding]:
    """Why processes that a launcher started had better not call MPI_Init."""
    if not started.launcher:
        return []
    if not look.library.name:
        return mpi_start.judge_library(look)
    shared = host.read_shared()
    try:
        refuse_before_init(environment, look.says)
    except LaunchError as failure:
        return mpi_start.judge_start(str(failure), look)
    return [host.judge_shared(shared, 1)] if shared.free < host.FATAL_SHARED_BYTES else []


def _refuse(
    findings: Sequence[Finding], started: Started, options: DoctorOptions, console: Console
) -> int:
    """The first process tells the findings, all leave with 1."""
    if started.rank == 0:
        tell([FindingRow(finding) for finding in findings], {}, options.as_json, console)
        return 1
    if (
        started.local_rank == 0 and findings[0].area == host.AREA
    ):  # the fault is this host's, maybe not the first's
        sys.stderr.write(
            f"mpillm: error: {os.uname().nodename}: {findings[0].name}: {findings[0].found}\n"
        )
        sys.stderr.flush()
    time.sleep(FIRST_SPEAKS_SECONDS)
    return 1


def _alone(
    options: DoctorOptions,
    console: Console,
    probes: Probes,
    environment: Mapping[str, str],
    look: mpi_start.Look,
) -> int:
    """All that can be said where MPI does not start."""
    of_site, site = _site(options, environment)
    job = HostJob([os.sched_getaffinity(0)], site_gpus=getattr(site, "gpus_per_node", 0))
    local = examine(options, probes, environment, look, job)
    findings = [
        *mpi_start.judge_library(look),
        *local.findings,
        *_of_job(options, environment, look, 1),
        of_site,
    ]
    return tell(
        [FindingRow(finding) for finding in findings],
        {local.host: local.facts},
        options.as_json,
        console,
    )


def _site(options: DoctorOptions, environment: Mapping[str, str]) -> tuple[Finding, Any]:
    """The finding on the site file, and the site; None where it cannot be read."""
    named = options.site or environment.get(SITE_VARIABLE) or None
    try:
        # A package that it needs may be what is missing.
        from mpillm.launch.site import load_site

        return batch_system.judge_site(
            None if named is None else Path(named), lambda path: load_site(path, environment)
        )
    except ImportError as failure:
        found = f"cannot be read without its package: {failure}"
        return Finding(
            batch_system.AREA,
            "site file",
            "warning",
            found,
            "install what is missing, as told under software",
        ), None


def _together(
    comm: "MPI.Intracomm",
    options: DoctorOptions,
    console: Console,
    probes: Probes,
    environment: Mapping[str, str],
    look: mpi_start.Look,
) -> int:
    """Every rank calls it. Where the ranks lose each other, each that notices says so, and the job is ended."""
    rows: list[FindingRow] = []
    facts: dict[str, Mapping[str, str]] = {}
    try:
        world = _world(comm)
        _collect(world, options, probes, environment, look, rows, facts)
        code = tell(rows, facts, options.as_json, console) if comm.rank == 0 else 0
        meet(comm)
        return int(comm.bcast(code))
    except Exception as failure:
        if comm.size == 1:
            raise
        _lost(comm, failure, rows, facts, options, console)


def _lost(
    comm: "MPI.Intracomm",
    failure: Exception,
    rows: list[FindingRow],
    facts: Mapping[str, Mapping[str, str]],
    options: DoctorOptions,
    console: Console,
) -> NoReturn:
    """A rank tells why it cannot go on, rank 0 with all that it knows, and the job is ended."""
    meeting = isinstance(failure, LaunchError)
    text = str(failure) if meeting else f"{type(failure).__name__}: {failure}; {MISSED}"
    if comm.rank == 0:
        found, _, remedy = text.partition("; ")
        tell(
            [*rows, FindingRow(Finding(ring_links.AREA, "messages", "error", found, remedy))],
            facts,
            options.as_json,
            console,
        )
    else:
        sys.stderr.write(f"mpillm: error: rank {comm.rank}: {text}\n")
        sys.stderr.flush()
    # Where messages are lost rank 0 notices too, a little later, and has more to tell.
    time.sleep(ABORT_SECONDS if meeting and comm.rank else 1)
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)
    raise SystemExit(1)


def _world(comm: "MPI.Intracomm") -> World:
    """Hosts of the same name (containers) are told apart by a number."""
    meet(comm)
    node_map = map_nodes(comm)
    node = node_map.split(comm)
    first = node_map.local_ranks(comm.rank)[0]
    told: list[tuple[int, str]] = comm.allgather((first, os.uname().nodename))
    names: dict[int, str] = {}
    for leader, name in told:
        names.setdefault(leader, name if name not in names.values() else f"{name}#{leader}")
    return World(comm, node, tuple(names[leader] for leader, _ in told))


def _collect(
    world: World,
    options: DoctorOptions,
    probes: Probes,
    environment: Mapping[str, str],
    look: mpi_start.Look,
    rows: list[FindingRow],
    facts: dict[str, Mapping[str, str]],
) -> None:
    """Fill `rows` and `facts` on rank 0, what is known first, so that a later failure leaves it there."""
    comm = world.comm
    of_site, site = _site(options, environment)
    masks = world.node.allgather(os.sched_getaffinity(0))
    job = HostJob(masks, comm.size, len(world.hosts), getattr(site, "gpus_per_node", 0))
    local = (
        replace(examine(options, probes, environment, look, job), host=world.host)
        if world.leads
        else None
    )
    meet(comm)
    told: list[Local] = [one for one in comm.allgather(local) if one is not None]
    rows += [FindingRow(finding) for finding in _of_library(comm, look)]
    rows += merge({one.host: one.findings for one in told})
    facts |= {one.host: one.facts for one in told}
    rows += [
        FindingRow(finding)
        for finding in [*_of_job(options, environment, look, comm.size), of_site]
    ]
    meet(comm)
    rows += [FindingRow(finding) for finding in _of_hosts(world, options, environment, facts, rows)]
    rows += [FindingRow(finding) for finding in _of_ranks(world, environment)]
    rows += [FindingRow(finding) for finding in _of_profile(world, options, probes, site)]


def _of_library(comm: "MPI.Intracomm", look: mpi_start.Look) -> list[Finding]:
    from mpi4py import MPI

    return mpi_start.judge_library(replace(look, thread_level=MPI.Query_thread()))


def _of_job(
    options: DoctorOptions, environment: Mapping[str, str], look: mpi_start.Look, ranks: int
) -> list[Finding]:
    """What is asked once a job, and needs no messages."""
    if detect(environment).rank:
        return []

    def check_hosts() -> list[Finding]:
        listed, scheduler = reach.allocated(environment)
        hosts = list(options.hosts) or ([] if ranks > 1 else listed)
        return reach.judge_hosts(reach.try_hosts(hosts, os.uname().nodename), scheduler)

    findings = guarded(
        mpi_start.AREA,
        "mpirun",
        lambda: [
            mpi_start.judge_mpirun(
                look,
                mpi_start.find_mpirun(environment),
                batch_system.starters(environment),
                ranks > 1,
            )
        ],
    )
    findings += guarded(reach.AREA, "reach", check_hosts)
    systems = batch_system.find_systems(environment)
    return [*findings, batch_system.judge_systems(systems, current_job(environment))]


def _of_hosts(
    world: World,
    options: DoctorOptions,
    environment: Mapping[str, str],
    facts: Mapping[str, Mapping[str, str]],
    rows: Sequence[FindingRow],
) -> list[Finding]:
    """Whether the hosts are alike and share the folders. Every rank calls it; `rows`: what is known on rank 0."""
    if len(world.hosts) < 2:
        return []
    # A file server that hangs takes whoever asks it with it.
    ill = {
        row.finding.name
        for row in rows
        if (row.finding.area, row.finding.verdict) == (folders.AREA, "error")
    }
    # The folder for temporary files is each host's own, and should be.
    paths = options.paths or wished_paths(options, environment)[:1]
    paths = world.comm.bcast([path for path in paths if str(path) not in ill])
    seen = shared_folder.seen_by(world.comm, paths, world.leads, world.host)
    judged = [
        shared_folder.judge_sharing(path, hosts, bool(options.paths))
        for path, hosts in seen.items()
    ]
    return homogeneous.judge_alike(facts) + [finding for finding in judged if finding]


def _of_ranks(world: World, environment: Mapping[str, str]) -> list[Finding]:
    """Where the ranks are, and how their messages pass. Every rank calls it."""
    comm = world.comm
    places = placement(comm, environment, threads_per_rank(comm, environment))
    narrow = narrow_binding(places)
    found, _, remedy = narrow.partition("; ")
    findings = [Finding(host.AREA, "binding", "warning", found, remedy)] if narrow else []
    if comm.size < 2:
        return findings
    meet(comm)
    crowded = any(
        place.local_size > min(place.limit, len(_cpus(places, place.host))) for place in places
    )
    led = ring_links.measure(comm, world.host_of)
    # A pair between which no message passes has said so by now.
    meet(comm, ring_links.PATIENCE_SECONDS + 10)
    pairs = [pair for of_rank in comm.allgather(led) for pair in of_rank]
    return findings + ring_links.judge_neighbours(pairs, crowded)


def _cpus(places: Sequence[Any], host: str) -> frozenset[int]:
    return frozenset[int]().union(*(place.cpus for place in places if place.host == host))


def _of_profile(world: World, options: DoctorOptions, probes: Probes, site: Any) -> list[Finding]:
    """Whether the cluster profile, if one is named, is of this cluster. Every rank calls it."""
    path = world.comm.bcast(
        options.profile or (Path(site.profile) if getattr(site, "profile", "") else None)
    )
    if path is None:
        return []
    cluster = probes.describe_cluster(world.comm)
    return (
        guarded(
            batch_system.PROFILE_AREA,
            path.name,
            lambda: [batch_system.judge_profile(path, probes.load_profile, cluster)],
        )
        if world.comm.rank == 0
        else []
    )
