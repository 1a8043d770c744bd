"""The site file: settings of every job at one computing centre.

Its place is ~/.config/mpillm/site.toml, or --site FILE.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from mpillm.errors import UsageError
from mpillm.launch.quoting import CONSTRAINT, DIRECTIVE, MODULE, VARIABLE, WORD, check_text, checked
from mpillm.launch.schedulers.scheduler_catalog import check_scheduler
from mpillm.system.messages import explain
from mpillm.system.plain_files import read_text

SITE_VARIABLE = "MPILLM_SITE"
# bash sets these itself and refuses an assignment.
_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
_LEADING_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))(?=/|$)", re.ASCII)
Many = Annotated[int, Ge(0), Le(10_000_000)]
LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Site:
    """The keys of a site file; every one may be left out."""

    scheduler: str = "auto"
    """A name of the catalogue, a plug-in, or auto: the one whose commands are on PATH."""
    partition: str = ""
    """Slurm's partition, the queue of PBS and LSF."""
    account: str = ""
    """The project that pays."""
    qos: str = ""
    """Slurm's quality of service."""
    constraint: str = ""
    """Slurm's --constraint; a part of PBS's chunk, such as cpu_type=milan; LSF's select[…]."""
    directives: tuple[str, ...] = ()
    """More directives as they are, such as --exclusive or --mem=0."""
    cores_per_node: Many = 0
    """Physical cores of a node; 0: unknown, so nothing is checked."""
    gpus_per_node: Many = 0
    """GPUs of a node, which a job asks for unless --gpus-per-node differs."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """The option that asks Slurm for them; none: the partition gives whole nodes."""
    modules: tuple[str, ...] = ()
    """Modules for `module load`, in this order."""
    environment: str = ""
    """The folder of a Python environment (venv or conda) with mpillm; empty: the submitting one."""
    program: tuple[str, ...] = ()
    """Words that start mpillm elsewhere, such as ["apptainer", "exec", "x.sif", "mpillm"]."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, taken literally."""
    launcher: Literal["", "srun", "mpirun", "mpiexec", "jsrun"] = ""
    """The program that starts the ranks; empty: srun under Slurm, else mpirun."""
    launcher_arguments: tuple[str, ...] = ()
    """Further arguments of the launcher, such as --mpi=pmix.

    An argument that places ranks replaces mpillm's own placing.
    """
    node_local: str = ""
    """A folder on each node's own disk or memory for --stage; may begin with $TMPDIR."""
    stop_seconds: Many = 0
    """Seconds before its end at which a job is asked to save and stop; 0: by the wall time."""
    hdf5_file_locking: bool | None = None
    """Whether HDF5 locks files; left out: by the file systems of the run and the data."""
    profile: str = ""
    """The cluster profile that `mpillm bench all --save` wrote, for recipes that name none."""

    # pydantic reads it.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        check_scheduler(self.scheduler, "scheduler")
        self._check_directives()
        for name, value in self.variables.items():
            checked(name, VARIABLE, "the name of each of variables")
            check_text(value, f"variables.{name} =")
            if name in _READ_ONLY:
                raise UsageError(f"variables.{name}: bash sets {name} itself; leave it out")
        for key in ("environment", "node_local", "profile"):
            check_text(getattr(self, key), f"{key} =")
        for word in (*self.program, *self.launcher_arguments):
            check_text(word, "the word")
        if self.node_local and not (
            self.node_local.startswith("/") or leading_variable(self.node_local)[0]
        ):
            raise UsageError(
                "node_local is a folder such as /tmp, $TMPDIR or $TMPDIR/mpillm, "
                f"and not {self.node_local!r}"
            )

    def _check_directives(self) -> None:
        for key in ("partition", "account", "qos"):
            if value := getattr(self, key):
                checked(value, WORD, key)
        if self.constraint:
            checked(self.constraint, CONSTRAINT, "constraint")
        for directive in self.directives:
            checked(directive, DIRECTIVE, "each of directives")
        for module in self.modules:
            checked(module, MODULE, "each of modules")


def leading_variable(path: str) -> tuple[str, str]:
    """Split `$TMPDIR/x` into ("TMPDIR", "/x"); a path without a variable into ("", path)."""
    found = _LEADING_VARIABLE.match(path)
    return (found[1] or found[2], path[found.end() :]) if found else ("", path)


def load_site(path: Path | None, environment: Mapping[str, str]) -> Site:
    """Read the site file `path`, else that of MPILLM_SITE, else the user's own; else defaults.

    In environment and profile a leading `~` or `$NAME` is expanded. Raises UsageError with each
    fault.
    """
    named = path or (Path(environment[SITE_VARIABLE]) if environment.get(SITE_VARIABLE) else None)
    source = named or _own_file(environment)
    try:
        text = read_text(source, LARGEST_FILE)
    except (FileNotFoundError, NotADirectoryError) as failure:
        if named is None:
            return Site()
        raise UsageError(
            f"cannot read the site file {source}: {failure.strerror}; jobs/sites has examples"
        ) from None
    except OSError as failure:
        raise UsageError(f"cannot read the site file {explain(failure, source)}") from failure
    except ValueError as failure:
        raise UsageError(f"cannot read the site file {source}: {failure}") from failure
    return parse_site(text, str(source), environment)


def parse_site(text: str, source: str, environment: Mapping[str, str]) -> Site:
    """Check a site file's text; `source` names it in messages. Raises UsageError."""
    # Imported here: most verbs need no site file.
    from pydantic import TypeAdapter, ValidationError

    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as failure:
        # A number of thousands of digits is a plain ValueError.
        raise UsageError(f"the site file {source} is not valid TOML: {failure}") from failure
    try:
        for key in ("environment", "profile"):
            if isinstance(table.get(key), str):
                table[key] = _expanded(table[key], key, environment)
        try:
            as_json = json.dumps(table, default=str)
        except (ValueError, RecursionError) as failure:
            raise UsageError(f"a value cannot be read: {failure}") from failure
        return TypeAdapter(Site).validate_json(as_json)
    except ValidationError as failure:
        faults = dict.fromkeys(
            _fault(error["type"], error["loc"], error["msg"], error["input"])
            for error in failure.errors()
        )
        raise UsageError(f"the site file {source}: {'; '.join(faults)}") from failure
    except UsageError as failure:
        raise UsageError(f"the site file {source}: {failure}") from failure


def _own_file(environment: Mapping[str, str]) -> Path:
    folder = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '')}/.config"
    return Path(folder) / "mpillm" / "site.toml"


def _expanded(path: str, key: str, environment: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        path = "$HOME" + path[1:]
    name, rest = leading_variable(path)
    if name and not environment.get(name):
        raise UsageError(
            f"{key} = {path!r} begins with ${name}, which is not set here; "
            "set it or write the path out"
        )
    path = environment[name] + rest if name else path
    if path and not path.startswith("/"):
        raise UsageError(
            f"{key} is an absolute path, from /, ~ or a variable, and not {path!r}; write it out"
        )
    return path


def _fault(kind: str, place: tuple[int | str, ...], message: str, value: object) -> str:
    name = ".".join(str(part) for part in place)
    if kind == "unexpected_keyword_argument":
        known = [key.name for key in fields(Site)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        return f"unknown key {name}{hint} (known: {', '.join(known)})"
    return f"{name} = {value!r}: {message[0].lower()}{message[1:]}"
