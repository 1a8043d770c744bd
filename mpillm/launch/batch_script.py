"""A batch script from plain values, by the templates of jobs/templates. Reads no other file."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import LaunchError, UsageError
from mpillm.launch.quoting import (
    CONSTRAINT,
    DIRECTIVE,
    MODULE,
    NAME,
    VARIABLE,
    WORD,
    Verbatim,
    check_text,
    checked,
    finalize,
    quote,
)
from mpillm.launch.schedulers.batch_system import BatchSystem
from mpillm.launch.schedulers.scheduler_catalog import known_systems, load_scheduler
from mpillm.launch.site import Site, leading_variable
from mpillm.system.messages import why
from mpillm.system.plugins import is_plugin

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent
# An installation has them next to this file, a checkout next to the other job scripts.
TEMPLATES = (HERE / "templates", HERE.parents[1] / "jobs" / "templates")
# Launchers that may start ranks under any batch system.
COMMON_LAUNCHERS = ("", "mpirun", "mpiexec")
# A launcher's argument with one of these beginnings places ranks, and replaces our own placing.
PLACING = (
    "--map-by",
    "-map-by",
    "--bind-to",
    "-bind-to",
    "-ppn",
    "--ppn",
    "-perhost",
    "--rankfile",
    "-rf",
    "--cpu-bind",
)
# A job is asked to stop a twentieth of its time before its end: never less than a minute, which a
# small checkpoint needs, nor more than ten.
STOP_SHARE, LEAST_STOP_SECONDS, MOST_STOP_SECONDS = 20, 60, 600


@dataclass(frozen=True)
class BatchJob:
    """The values of a script. Folders and files are absolute paths."""

    name: str
    run: str
    folder: str
    """The folder of the submission, where the recipe's relative paths start."""
    command: tuple[str, ...]
    """The command that each rank runs."""
    nodes: int
    ranks_per_node: int
    threads: int
    """Per rank."""
    seconds: int
    """Wall time."""
    stop_seconds: int
    gpus_per_node: int = 0
    partition: str = ""
    account: str = ""
    max_restarts: int = 100
    data: str = ""
    """The dataset's folder, for staging."""
    stage: bool = False
    oversubscribe: bool = False
    """More ranks × threads than cores."""
    cores_per_node: int = 0
    hdf5_file_locking: str = ""
    """TRUE, FALSE or, to leave it to HDF5, empty."""

    def __post_init__(self) -> None:
        for key in ("run", "folder", "data"):
            if (path := getattr(self, key)) and not path.startswith("/"):
                raise AssertionError(f"{key} must be an absolute path: {path}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_node(self) -> int:
        cpus = self.ranks_per_node * self.threads
        return min(cpus, self.cores_per_node or self.threads) if self.oversubscribe else cpus

    @property
    def slots(self) -> int:
        return self.nodes * self.cpus_per_node

    @property
    def stop_minutes(self) -> int:
        return -(-self.stop_seconds // 60)


def stop_seconds_for(seconds: int) -> int:
    """Return how long before the end of its `seconds` of wall time a job is asked to stop."""
    return min(max(seconds // STOP_SHARE, LEAST_STOP_SECONDS), MOST_STOP_SECONDS, seconds // 3)


def render_script(scheduler: str, job: BatchJob, site: Site) -> str:
    """Write the batch script of `job` for a batch system at `site`, as text.

    Each value is checked where the shell does not quote (directives), and quoted as one word
    elsewhere. Raises UsageError for a value that allows neither, and for a setting that the
    scheduler does not have.
    """
    system = load_scheduler(scheduler)
    _check(scheduler, system, job, site)
    variable, rest = leading_variable(site.node_local.rstrip("/"))
    launcher = site.launcher or system.launcher
    text = _template(scheduler, system).render(
        job=_Checked(job, site),
        site=site,
        scheduler=scheduler,
        plugin=scheduler if is_plugin(scheduler) else "",
        time=Verbatim(system.write_time(job.seconds)),
        directives=[
            checked(directive, DIRECTIVE, "each of directives") for directive in site.directives
        ],
        modules=[checked(module, MODULE, "each of modules") for module in site.modules],
        names={
            name: checked(name, VARIABLE, "the name of each of variables")
            for name in site.variables
        },
        launcher=f"{launcher}.sh" if launcher in ("srun", "jsrun") else "mpirun.sh",
        program=Verbatim(launcher),
        placed=any(word.startswith(PLACING) for word in site.launcher_arguments),
        local_variable=checked(variable, VARIABLE, "the variable of node_local")
        if variable
        else "",
        local_rest=quote(check_text(rest, "node_local =")) if rest else Verbatim(""),
        hosts_variable=Verbatim(system.hosts_variable),
        limit_signals=Verbatim(system.limit_signals),
        given_up=system.given_up_code,
    )
    return _squeezed(text)


class _Checked:
    """A job for a template, with the values of directives checked and unquoted."""

    def __init__(self, job: BatchJob, site: Site) -> None:
        self._job = job
        self.name = checked(job.name, NAME, "the job's name")
        self.partition = _word(job.partition or site.partition, "partition")
        self.account = _word(job.account or site.account, "account")
        self.qos = _word(site.qos, "qos")
        self.constraint = (
            checked(site.constraint, CONSTRAINT, "constraint") if site.constraint else ""
        )

    def __getattr__(self, key: str) -> Any:
        return getattr(self._job, key)


def _word(value: str, what: str) -> str:
    return checked(value, WORD, what) if value else ""


def _check(scheduler: str, system: BatchSystem, job: BatchJob, site: Site) -> None:
    if site.qos and not system.has_qos:
        having = " and ".join(other.title for other in known_systems().values() if other.has_qos)
        raise UsageError(
            f"qos = {site.qos!r}: only {having} has qualities of service; "
            f"give {scheduler} its own as directives"
        )
    launcher = site.launcher
    if launcher not in (*COMMON_LAUNCHERS, *system.own_launchers):
        raise UsageError(
            f"launcher = {launcher!r} does not exist under {scheduler}; take mpirun or leave it out"
        )
    if job.stage and not site.node_local:
        raise UsageError(
            "--stage copies the data to each node's own disk, and the site file does not name it; "
            'set node_local = "$TMPDIR" or another folder there'
        )
    if not 0 < job.stop_seconds < job.seconds:
        raise UsageError(
            f"a job of {job.seconds} s cannot stop {job.stop_seconds} s before its end; "
            "lower stop_seconds in the site file, or give the job more --time"
        )


def _template(scheduler: str, system: BatchSystem) -> "jinja2.Template":
    """Load the system's template: one of mpillm's own, or a plug-in's file that may extend one."""
    if system.template is None:
        raise UsageError(
            f"{scheduler} has no template of a batch script; name another --scheduler, or give the "
            "batch system a template"
        )
    if not system.template.is_absolute():
        return _templates().get_template(str(system.template))
    try:
        text = system.template.read_text(encoding="utf-8")
    except (OSError, ValueError) as failure:
        raise LaunchError(
            f"cannot read the template {system.template} of {scheduler}: {why(failure)}; "
            "install its package again"
        ) from failure
    return _templates().from_string(text)


@functools.cache
def _templates() -> "jinja2.Environment":
    # Imported here: only `mpillm submit` needs it.
    import jinja2

    folder = next((folder for folder in TEMPLATES if (folder / "job.sh").exists()), None)
    if folder is None:
        raise LaunchError(
            f"the templates of batch scripts are missing: neither {TEMPLATES[0]} nor "
            f"{TEMPLATES[1]} has them; install mpillm again"
        )
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _squeezed(text: str) -> str:
    """Empty the lines of spaces alone, and join empty lines."""
    lines = [line.rstrip() if not line.strip() else line for line in text.split("\n")]
    return "\n".join(
        line for line, before in zip(lines, ["x", *lines], strict=False) if line or before
    )
