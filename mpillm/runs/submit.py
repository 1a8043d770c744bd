"""`mpillm submit`: make a batch job from a recipe, a site file and a few numbers."""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mpillm.errors import UsageError
from mpillm.launch.batch_script import BatchJob, render_script, stop_seconds_for
from mpillm.launch.current_job import next_job_environment
from mpillm.launch.schedulers.scheduler_catalog import (
    find_scheduler,
    is_over,
    job_state,
    load_scheduler,
)
from mpillm.launch.site import Site
from mpillm.launch.walltime import seconds_of
from mpillm.machine.mounts import Mount, hdf5_file_locking, read_mounts
from mpillm.runs.folder import JOB, JOB_RECIPE, JOB_SCRIPT, METRICS, SUBMIT_LOCK
from mpillm.runs.lock import RunLock, find_hold
from mpillm.runs.run_files import read_job, refuse_dataset
from mpillm.system.atomic import make_folder, write_json, write_text
from mpillm.system.command_line import Json, Option
from mpillm.system.console import Console, clock, counted
from mpillm.system.json_text import to_json
from mpillm.system.messages import command
from mpillm.system.plain_files import is_there
from mpillm.tokens.dataset_folder import is_dataset
from mpillm.weights.places import CHECKPOINTS

# A run that has begun leaves one of these.
BEGUN = (METRICS, CHECKPOINTS)
# No machine has more nodes, no node more ranks, and every batch system reads such a number.
LARGEST_COUNT = 10_000_000


@dataclass(frozen=True)
class SubmitOptions:
    """The options of `mpillm submit`. Raises UsageError for a number that no job can have."""

    nodes: Annotated[int, Option("Nodes of the job.")]
    ranks_per_node: Annotated[int, Option("Ranks on each.")]
    time: Annotated[str, Option("Wall time: 1:30:00, 2-00:00:00, 90m, 2h.")]
    scheduler: Annotated[
        str, Option("slurm, pbs, lsf, auto: the one that is here, or your own.")
    ] = "auto"
    partition: Annotated[str, Option("Slurm's partition, the queue of PBS and LSF.")] = ""
    account: Annotated[str, Option("The project that pays.")] = ""
    name: Annotated[str, Option("The job's name; else the recipe's.")] = ""
    threads: Annotated[
        int, Option("Threads a rank; 0: the node's cores divided by the ranks, or 1.")
    ] = 0
    gpus_per_node: Annotated[int | None, Option("GPUs to ask for; else as the site file says.")] = (
        None
    )
    stage: Annotated[bool, Option("Copy the shards to each node first.")] = False
    oversubscribe: Annotated[bool, Option("Allow more threads than cores.")] = False
    resume: Annotated[bool, Option("Continue the run that is there.")] = False
    force: Annotated[
        bool, Option("Train although the estimated memory exceeds that of a host.")
    ] = False
    max_restarts: Annotated[
        int, Option("How often a job that ran out of time is submitted again.")
    ] = 100
    dry_run: Annotated[bool, Option("Show the script, and do nothing.")] = False
    as_json: Json = False

    def __post_init__(self) -> None:
        counts = {
            "--nodes": (self.nodes, 1),
            "--ranks-per-node": (self.ranks_per_node, 1),
            "--threads": (self.threads, 0),
            "--gpus-per-node": (self.gpus_per_node or 0, 0),
            "--max-restarts": (self.max_restarts, 0),
        }
        for name, (count, least) in counts.items():
            if not least <= count <= LARGEST_COUNT:
                most = f" to {LARGEST_COUNT:,}" if count > least else ""
                raise UsageError(f"{name} is a number from {least}{most}, and not {count}")

    @property
    def ranks(self) -> int:
        """The ranks of the whole job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SubmittedRecipe:
    """The part of a recipe that a job needs; train, which reads recipes, is a floor above."""

    name: str
    run: str
    data: str
    profile: str
    text: str
    """The whole resolved recipe, as TOML."""


def submit_run(
    options: SubmitOptions,
    recipe: SubmittedRecipe,
    site: Site,
    console: Console,
    environment: Mapping[str, str],
) -> None:
    """Write RUN/job.toml and RUN/job.sh, submit the script, and record the job in RUN/job.json.

    With `dry_run` print the script and write nothing. The caller has checked that the recipe's
    mesh fits `options.ranks`. Raises UsageError for a job that cannot be, and LaunchError with the
    batch system's own words.
    """
    scheduler = find_scheduler(
        site.scheduler if options.scheduler == "auto" else options.scheduler, environment
    )
    site = _with_environment(site, environment)
    job = make_job(options, recipe, site, Path.cwd(), read_mounts())
    script = render_script(scheduler, job, site)
    run = Path(job.run)
    _check_unused(run, options.resume)
    if options.dry_run:
        console.write(_as_json(scheduler, job, script, None) if options.as_json else script)
        return
    _check_here(run, job, site)
    make_folder(run)
    system = load_scheduler(scheduler)
    # Of two that submit one run at the same time, one does, and the other says so.
    lock = RunLock(run, None, console.warn, SUBMIT_LOCK)
    try:
        _check_queued(run, environment)
        write_text(run / JOB_RECIPE, recipe.text, plain=True)
        write_text(run / JOB_SCRIPT, script, plain=True)
        if not options.as_json:
            console.write(script)
        number = system.submit_script(job.run, next_job_environment(environment, system))
        facts = _facts(scheduler, job, number)
        write_json(run / JOB, facts, plain=True)
    finally:
        lock.release()
    if options.as_json:
        console.write(_as_json(scheduler, job, script, facts))
    else:
        console.say(
            f"job {facts['id']} is submitted to {system.title}: "
            f"{counted(job.nodes, 'node')} × {counted(job.ranks_per_node, 'rank')} × "
            f"{counted(job.threads, 'thread')} for {clock(job.seconds)}\n"
            f"its output: {facts['output']}"
        )


def make_job(
    options: SubmitOptions,
    recipe: SubmittedRecipe,
    site: Site,
    folder: Path,
    mounts: Sequence[Mount],
) -> BatchJob:
    """Make the job that `options` ask for, checked against the site's nodes.

    Relative paths of the recipe start at `folder`. Raises UsageError.
    """
    threads = options.threads or max(1, site.cores_per_node // options.ranks_per_node)
    _check_cores(options, site, threads)
    gpus = site.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    if site.gpus_per_node and gpus > site.gpus_per_node:
        raise UsageError(
            f"--gpus-per-node {gpus}: a node has {site.gpus_per_node} by the site file; "
            "ask for fewer"
        )
    seconds = seconds_of(options.time)
    # Path.resolve would replace links, which other nodes may see differently.
    whole = os.path.abspath
    run, data = whole(folder / recipe.run), whole(folder / recipe.data)
    program = site.program or (
        (f"{site.environment}/bin/python" if site.environment else sys.executable),
        "-m",
        "mpillm",
    )
    profile = (
        ("--set", f"parallel.profile={site.profile}") if site.profile and not recipe.profile else ()
    )
    return BatchJob(
        name=options.name or job_name(recipe.name),
        run=run,
        folder=str(folder),
        command=(
            *(*program, "train", f"{run}/{JOB_RECIPE}", "--resume"),
            *("--force",) * options.force,
            *profile,
        ),
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        threads=threads,
        seconds=seconds,
        stop_seconds=site.stop_seconds or stop_seconds_for(seconds),
        gpus_per_node=gpus,
        partition=options.partition or site.partition,
        account=options.account or site.account,
        max_restarts=options.max_restarts,
        data=data,
        stage=options.stage,
        oversubscribe=options.oversubscribe,
        cores_per_node=site.cores_per_node,
        hdf5_file_locking=hdf5_file_locking(site.hdf5_file_locking, (run, data), mounts),
    )


def job_name(text: str) -> str:
    """Turn a recipe's name into a job's name: characters that a system may refuse become `-`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text, flags=re.ASCII).strip("-._")[:15] or "mpillm"


def _check_cores(options: SubmitOptions, site: Site, threads: int) -> None:
    wanted = options.ranks_per_node * threads
    if site.cores_per_node and wanted > site.cores_per_node and not options.oversubscribe:
        raise UsageError(
            f"{options.ranks_per_node} ranks × {threads} threads need {wanted} cores a node, and "
            f"the site file's nodes have {site.cores_per_node}; lower --ranks-per-node or "
            "--threads, or say --oversubscribe"
        )


def _check_unused(run: Path, resume: bool) -> None:
    if is_there(run) and not run.is_dir():
        raise UsageError(f"the run {run} is a file; name another train.run")
    refuse_dataset(run)
    if not resume and any(os.path.lexists(run / name) for name in BEGUN):
        raise UsageError(
            f"{run} holds a run already; --resume continues it, or name another train.run"
        )


def _check_here(run: Path, job: BatchJob, site: Site) -> None:
    """Refuse now a job that would fail only after hours in the queue."""
    if hold := find_hold(run):
        raise UsageError(f"the run {run} is held by {hold.describe()}; wait for it or end it")
    if not is_dataset(Path(job.data)):
        prepare = command(["mpillm", "prepare", "SOURCE", "--out", job.data])
        what = "is no prepared dataset" if Path(job.data).is_dir() else "is no folder"
        raise UsageError(f"the data {job.data} {what}; make one with {prepare}")
    if site.environment and not os.access(f"{site.environment}/bin/python", os.X_OK):
        raise UsageError(
            f"there is no Python in environment = {site.environment!r}; correct the site file"
        )


def _check_queued(run: Path, environment: Mapping[str, str]) -> None:
    """Refuse a run whose newest job is still queued or runs. Raises UsageError."""
    queued = read_job(run)
    if not queued.get("scheduler") or not queued.get("id"):
        return
    state = job_state(queued["scheduler"], queued["id"], environment)
    if state and not is_over(queued["scheduler"], state):
        raise UsageError(
            f"the run {run} is submitted already, as job {queued['id']} ({state}); "
            "wait for it or cancel it"
        )


def _with_environment(site: Site, environment: Mapping[str, str]) -> Site:
    """Let the job run in this environment where the site file names neither one nor a program."""
    here = (
        sys.prefix
        if sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
        else ""
    )
    return (
        replace(site, environment=here)
        if here and not site.environment and not site.program
        else site
    )


def _facts(scheduler: str, job: BatchJob, number: str) -> dict[str, Any]:
    # The template pbs.sh replaces the line of "id".
    return {
        "scheduler": scheduler,
        "id": number,
        "name": job.name,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "nodes": job.nodes,
        "ranks_per_node": job.ranks_per_node,
        "threads": job.threads,
        "gpus_per_node": job.gpus_per_node,
        "seconds": job.seconds,
        "partition": job.partition,
        "account": job.account,
        "folder": job.folder,
        "output": f"{job.run}/job-{number}.out",
    }


def _as_json(scheduler: str, job: BatchJob, script: str, facts: Mapping[str, Any] | None) -> str:
    value = {
        "scheduler": scheduler,
        "run": job.run,
        "command": list(job.command),
        "script": script,
        "job": facts,
    }
    return to_json(value) + "\n"
