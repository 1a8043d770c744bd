"""`mpillm doctor`: run all checks, alone or under mpirun, and report on rank 0.

MPI itself may be the fault, and MPI_Init ends a process that it refuses. So a child process tries
it first. Processes that MPI does not join leave with one report, of the first of them.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from mpillm.comm.world import open_world
from mpillm.doctor.check_base import Check, HostView, JobView, World, meet
from mpillm.doctor.check_catalog import CHECKS
from mpillm.doctor.checks import dev_shm, ring_links
from mpillm.doctor.checks.loaded_mpi import judge_library, judge_start
from mpillm.doctor.checks.site_file import read_site
from mpillm.doctor.findings import MISSED, Finding, FindingRow, guarded, merge
from mpillm.doctor.findings_report import print_findings
from mpillm.doctor.mpi_look import MpiLook, look_at_mpi
from mpillm.doctor.options import DoctorOptions
from mpillm.errors import LaunchError
from mpillm.launch.launchers import Started, detect
from mpillm.launch.placement import placement
from mpillm.launch.singleton import refuse_before_init, refuse_lonely_ranks, without_foreign_warning
from mpillm.launch.threads import threads_per_rank
from mpillm.machine.node_map import map_nodes
from mpillm.system.console import Console
from mpillm.system.environment import without_launcher
from mpillm.system.plugins import load_class

if TYPE_CHECKING:
    from mpi4py import MPI

# A launcher kills the job once a rank leaves with an error: rank 0 must have printed by then.
PRINT_SECONDS, ABORT_SECONDS = 5.0, 60.0


def diagnose(options: DoctorOptions, console: Console, environment: Mapping[str, str]) -> int:
    """Run all checks and report; return the exit code, 1 after an error, on every rank.

    Every process calls it before MPI has been started. `console` prints on rank 0. Raises
    UsageError for a check that cannot be found.
    """
    environment = dict(environment)  # MPI_Init adds to it
    checks = load_checks(options.checks)
    started = detect(environment)
    look = look_at_mpi(without_launcher(environment), start=not started.launcher)
    if refusal := _refusal(environment, started, look):
        return _refuse(refusal, started, options, console)
    job = JobView(options, environment, look, read_site(options.site, environment))
    if not look.library.name or look.failure:
        return _alone(checks, job, console)
    with without_foreign_warning():
        comm = open_world(alone=not started.launcher)
    try:
        refuse_lonely_ranks(environment, comm.size, look.version)
    except LaunchError as failure:
        return _refuse(judge_start(str(failure), look), started, options, console)
    return _together(comm, checks, job, console)


def load_checks(more: Sequence[str] = ()) -> list[Check]:
    """Make the checks of the catalogue, then `more`, each `package.module:Name`."""
    return [load_class(name, CHECKS, "check", Check)() for name in (*CHECKS, *more)]


def _refusal(environment: Mapping[str, str], started: Started, look: MpiLook) -> list[Finding]:
    """Find why processes of a launcher must not call MPI_Init; [] where they may."""
    if not started.launcher:
        return []
    if not look.library.name:
        return judge_library(look)
    shared = dev_shm.read_shared()
    try:
        refuse_before_init(environment, look.version)
    except LaunchError as failure:
        return judge_start(str(failure), look)
    full = shared.free < dev_shm.FATAL_SHARED_BYTES
    return [dev_shm.judge_shared(shared, 1)] if full else []


def _refuse(
    findings: Sequence[Finding], started: Started, options: DoctorOptions, console: Console
) -> int:
    """Report the findings on rank 0; return 1 on every rank."""
    if started.rank == 0:
        print_findings([FindingRow(finding) for finding in findings], {}, options.as_json, console)
        return 1
    # The fault may be this host's alone, so its first rank prints it too.
    if started.local_rank == 0 and findings[0].area == dev_shm.AREA:
        host = os.uname().nodename
        _print_error(f"{host}: {findings[0].name}: {findings[0].found}")
    time.sleep(PRINT_SECONDS)
    return 1


def _print_error(text: str) -> None:
    sys.stderr.write(f"mpillm: error: {text}\n")
    sys.stderr.flush()


def _alone(checks: Sequence[Check], job: JobView, console: Console) -> int:
    """Run the checks that need no MPI, where MPI does not start."""
    facts: dict[str, str] = {}
    findings = _job_findings(checks, job)
    findings += _host_findings(checks, job, [os.sched_getaffinity(0)], facts)
    rows = [FindingRow(finding) for finding in findings]
    return print_findings(rows, {socket.gethostname(): facts}, job.options.as_json, console)


def _job_findings(checks: Sequence[Check], job: JobView) -> list[Finding]:
    """Run the checks of the job. Rank 0 alone calls it."""
    found: list[Finding] = []
    for check in checks:
        found += guarded(check.area, check.name, partial(check.examine_job, job))
    return found


def _host_findings(
    checks: Sequence[Check], job: JobView, masks: Sequence[set[int]], facts: dict[str, str]
) -> list[Finding]:
    """Run the checks of this host, and fill `facts`. The first rank of each host calls it."""
    host = HostView(job, without_launcher(job.environment), masks, facts)
    found: list[Finding] = []
    for check in checks:
        found += guarded(check.area, check.name, partial(check.examine_host, host))
    return found


def _together(
    comm: "MPI.Intracomm", checks: Sequence[Check], job: JobView, console: Console
) -> int:
    """Run the checks on all ranks. Every rank calls it.

    Where ranks lose each other, each rank that notices prints it, and the job is ended.
    """
    rows: list[FindingRow] = []
    facts: dict[str, Mapping[str, str]] = {}
    try:
        world = _open_job(comm, job)
        _collect(world, checks, rows, facts)
        code = print_findings(rows, facts, job.options.as_json, console) if comm.rank == 0 else 0
        world.meet()
        return int(comm.bcast(code))
    except Exception as failure:
        if comm.size == 1:
            raise
        _lost(comm, failure, rows, partial(print_findings, facts=facts, console=console), job)


def _lost(
    comm: "MPI.Intracomm",
    failure: Exception,
    rows: Sequence[FindingRow],
    report: "partial[int]",
    job: JobView,
) -> NoReturn:
    """Print why this rank cannot continue, on rank 0 with all that it knows, and end the job."""
    meeting = isinstance(failure, LaunchError)
    text = str(failure) if meeting else f"{type(failure).__name__}: {failure}; {MISSED}"
    if comm.rank == 0:
        found, _, remedy = text.partition("; ")
        lost = Finding(ring_links.AREA, "messages", "error", found, remedy)
        report(rows=[*rows, FindingRow(lost)], as_json=job.options.as_json)
    else:
        _print_error(f"rank {comm.rank}: {text}")
    # Where messages are lost, rank 0 notices a little later, and has more to report.
    time.sleep(ABORT_SECONDS if meeting and comm.rank else 1)
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)
    raise SystemExit(1)


def _open_job(comm: "MPI.Intracomm", job: JobView) -> World:
    """Gather the hosts. Equal names, as of containers, get a number. Every rank calls it."""
    from mpi4py import MPI

    meet(comm)
    node_map = map_nodes(comm)
    node = node_map.split(comm)
    leader = node_map.local_ranks(comm.rank)[0]
    gathered: list[tuple[int, str]] = comm.allgather((leader, os.uname().nodename))
    names: dict[int, str] = {}
    for first, name in gathered:
        names.setdefault(first, name if name not in names.values() else f"{name}#{first}")
    host_of = tuple(names[first] for first, _ in gathered)
    look = replace(job.look, thread_level=MPI.Query_thread())
    job = replace(job, look=look, ranks=comm.size, hosts=len(set(host_of)))
    return World(comm, node_map, node, host_of, job)


def _collect(
    world: World,
    checks: Sequence[Check],
    rows: list[FindingRow],
    facts: dict[str, Mapping[str, str]],
) -> None:
    """Fill `rows` and `facts`: rank 0 reports them even after a failure. Every rank calls it."""
    comm, job = world.comm, world.job
    # Before the checks of the job, which take rank 0 half a minute: others would spin in it.
    masks = world.node.allgather(os.sched_getaffinity(0))
    if comm.rank == 0:
        rows += [FindingRow(finding) for finding in _job_findings(checks, job)]
    mine: dict[str, str] = {}
    local = None
    if world.leads:
        local = (world.host, _host_findings(checks, job, masks, mine), mine)
    # Checks of a host may take minutes: early ranks sleep here instead of in the allgather.
    world.meet()
    hosts = [entry for entry in comm.allgather(local) if entry is not None]
    rows += merge({host: findings for host, findings, _ in hosts})
    facts |= {host: own for host, _, own in hosts}
    world.meet()
    threads = threads_per_rank(comm, job.environment, world.node_map)
    places = placement(comm, job.environment, threads, node_map=world.node_map)
    world = replace(world, facts=facts, rows=rows, places=places)
    for check in checks:
        world.meet()
        rows += [FindingRow(finding) for finding in _rank_findings(check, world)]


def _rank_findings(check: Check, world: World) -> Iterable[Finding]:
    """Compare ranks by one check; its own failure is a finding where no other rank waits."""
    if world.comm.size > 1:
        return check.examine_ranks(world)
    return guarded(check.area, check.name, partial(check.examine_ranks, world))
