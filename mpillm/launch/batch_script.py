"""A batch script from plain values: pure, no file but the templates is read. The templates are in jobs/templates."""

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
from mpillm.launch.site import Site, leading_variable
from mpillm.launch.walltime import clock_time, minutes_time

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent
# Installed beside this file; in a checkout beside the other job scripts.
TEMPLATES = (HERE / "templates", HERE.parents[1] / "jobs" / "templates")
TIMES = {"slurm": clock_time, "pbs": clock_time, "lsf": minutes_time}
# LSF's own at the limit is USR2; before it URG, whose default is to be ignored, so that it kills no ssh on its way.
LIMIT_SIGNALS = {"slurm": "USR1", "pbs": "USR1", "lsf": "URG USR1 USR2"}
# LSF queues a job that exits with 75 again, so there it must be another code when it shall not.
GIVEN_UP = {"slurm": 75, "pbs": 75, "lsf": 1}
# A launcher's argument that begins with one of these places ranks.
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
# How long before its end a job is asked to stop: a twentieth of it, within bounds.
STOP_SHARE, LEAST_STOP_SECONDS, MOST_STOP_SECONDS = 20, 60, 600


@dataclass(frozen=True)
class BatchJob:
    """What a script is made of. Folders and files are whole paths."""

    name: str
    run: str
    folder: str
    """Where it was submitted: the recipe's relative paths start there."""
    command: tuple[str, ...]
    """What each rank is."""
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
                raise AssertionError(f"{key} must be a whole path: {path}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_node(self) -> int:
        wanted = self.ranks_per_node * self.threads
        return min(wanted, self.cores_per_node or self.threads) if self.oversubscribe else wanted

    @property
    def slots(self) -> int:
        return self.nodes * self.cpus_per_node

    @property
    def stop_minutes(self) -> int:
        return -(-self.stop_seconds // 60)


def stop_seconds_for(seconds: int) -> int:
    """How long before the end of `seconds` of wall time a job is asked to stop, where the site does not say."""
    return min(max(seconds // STOP_SHARE, LEAST_STOP_SECONDS), MOST_STOP_SECONDS, seconds // 3)


def render(scheduler: str, job: BatchJob, site: Site) -> str:
    """The batch script of `job` for slurm, pbs or lsf at `site`, as text.

    Each value is either checked, where the shell's quotes do not hold, or quoted as one word. Raises UsageError for
    what can be neither, and for what the scheduler has no word for.
    """
    _check(scheduler, job, site)
    variable, rest = leading_variable(site.node_local.rstrip("/"))
    launcher = site.launcher or ("srun" if scheduler == "slurm" else "mpirun")
    text = (
        _templates()
        .get_template(f"{scheduler}.sh")
        .render(
            job=_Checked(job, site),
            site=site,
            scheduler=scheduler,
            time=Verbatim(TIMES[scheduler](job.seconds)),
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
            limit_signals=Verbatim(LIMIT_SIGNALS[scheduler]),
            given_up=GIVEN_UP[scheduler],
        )
    )
    return _squeezed(text)


class _Checked:
    """A job as a template sees it: what goes into directives is checked and bare."""

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


def _check(scheduler: str, job: BatchJob, site: Site) -> None:
    if site.qos and scheduler != "slurm":
        raise UsageError(
            f"qos = {site.qos!r}: only Slurm has qualities of service; give {scheduler} its own as directives"
        )
    launcher = site.launcher
    if (launcher == "srun" and scheduler != "slurm") or (
        launcher == "jsrun" and scheduler != "lsf"
    ):
        raise UsageError(
            f"launcher = {launcher!r} is not of {scheduler}; take mpirun or leave it out"
        )
    if job.stage and not site.node_local:
        raise UsageError(
            "--stage copies the data to each node's own disk, and the site file does not say where that is; "
            'set node_local = "$TMPDIR" or such in it'
        )
    if not 0 < job.stop_seconds < job.seconds:
        raise UsageError(
            f"a job of {job.seconds} s cannot be told to stop {job.stop_seconds} s before its end; "
            "lower stop_seconds in the site file, or give the job more --time"
        )


@functools.cache
def _templates() -> "jinja2.Environment":
    # Imported here: only `mpillm submit` needs it.
    import jinja2

    folder = next((folder for folder in TEMPLATES if (folder / "job.sh").exists()), None)
    if folder is None:
        raise LaunchError(
            f"the templates of batch scripts are missing: neither {TEMPLATES[0]} nor {TEMPLATES[1]} has them; "
            "install mpillm again"
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
    """No line of spaces alone, no two empty lines in a row."""
    lines = [line.rstrip() if not line.strip() else line for line in text.split("\n")]
    return "\n".join(
        line for line, before in zip(lines, ["x", *lines], strict=False) if line or before
    )
