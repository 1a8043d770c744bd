"""A site file: what is the same for every job at one computing centre. ~/.config/mpillm/site.toml, or --site FILE."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from mpillm.errors import UsageError
from mpillm.launch.quoting import CONSTRAINT, DIRECTIVE, MODULE, VARIABLE, WORD, check_text, checked

SITE_VARIABLE = "MPILLM_SITE"
# bash makes these itself and lets nobody set them.
_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
_LEADING_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))(?=/|$)", re.ASCII)
Many = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class Site:
    """Every key may be left out."""

    scheduler: Literal["auto", "slurm", "pbs", "lsf"] = "auto"
    """auto: the one whose commands are on PATH."""
    partition: str = ""
    """Slurm's partition, the queue of PBS and LSF."""
    account: str = ""
    """The project that pays."""
    qos: str = ""
    """Slurm's quality of service."""
    constraint: str = ""
    """Slurm's --constraint; for PBS more of the chunk, such as cpu_type=milan; for LSF what select[…] takes."""
    directives: tuple[str, ...] = ()
    """More directives as they are, such as --exclusive or --mem=0."""
    cores_per_node: Many = 0
    """Physical cores of a node; 0: not known, so nothing is checked."""
    gpus_per_node: Many = 0
    """GPUs of a node, which a job asks for where --gpus-per-node does not say otherwise."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How Slurm is asked for them; none: the partition gives whole nodes."""
    modules: tuple[str, ...] = ()
    """What `module load` loads, in this order."""
    environment: str = ""
    """The folder of a Python environment (venv or conda) that has mpillm; empty: the one that submits."""
    program: tuple[str, ...] = ()
    """Words that start mpillm where it isn't the environment's, such as ["apptainer", "exec", "x.sif", "mpillm"]."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, taken literally."""
    launcher: Literal["", "srun", "mpirun", "mpiexec", "jsrun"] = ""
    """What starts the ranks; empty: srun under Slurm, else mpirun."""
    launcher_arguments: tuple[str, ...] = ()
    """Further arguments of the launcher, such as --mpi=pmix. One that places ranks replaces mpillm's own placing."""
    node_local: str = ""
    """A folder on each node's own disk or memory for --stage; may begin with a variable of the job: $TMPDIR."""
    stop_seconds: Many = 0
    """How long before its end a job is told to save and stop; 0: by the wall time."""
    hdf5_file_locking: bool | None = None
    """Whether HDF5 locks files; left out: by the file system that the run and the data are on."""
    profile: str = ""
    """The cluster profile that `mpillm bench all --save` wrote, for recipes that name none."""

    # pydantic reads it.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        self._check_directives()
        for name, value in self.variables.items():
            checked(name, VARIABLE, "the name of each of variables")
            check_text(value, f"variables.{name} =")
            if name in _READ_ONLY:
                raise UsageError(f"variables.{name}: bash lets nobody set {name}; leave it out")
        for key in ("environment", "node_local", "profile"):
            check_text(getattr(self, key), f"{key} =")
        for word in (*self.program, *self.launcher_arguments):
            check_text(word, "the word")
        if self.node_local and not (
            self.node_local.startswith("/") or leading_variable(self.node_local)[0]
        ):
            raise UsageError(
                f"node_local is a folder such as /tmp, $TMPDIR or $TMPDIR/mpillm, and not {self.node_local!r}"
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
    """`$TMPDIR/x` → ("TMPDIR", "/x"); a path that begins with none → ("", path)."""
    found = _LEADING_VARIABLE.match(path)
    return (found[1] or found[2], path[found.end() :]) if found else ("", path)


def load_site(path: Path | None, environment: Mapping[str, str]) -> Site:
    """The site file `path`, else the one that MPILLM_SITE names, else the user's own; without one the defaults.

    In environment and profile a leading `~` or `$NAME` is put in. Raises UsageError naming each fault.
    """
    named = path or (Path(environment[SITE_VARIABLE]) if environment.get(SITE_VARIABLE) else None)
    source = named or _own_file(environment)
    try:
        text = source.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as failure:
        if named is None:
            return Site()
        raise UsageError(
            f"cannot read the site file {source}: {failure.strerror}; jobs/sites has examples"
        ) from None
    except UnicodeDecodeError as failure:
        raise UsageError(f"the site file {source} is not valid TOML: {failure}") from failure
    except (OSError, ValueError) as failure:
        raise UsageError(f"cannot read the site file {source}: {failure}") from failure
    return parse_site(text, str(source), environment)


def parse_site(text: str, source: str, environment: Mapping[str, str]) -> Site:
    """Check a site file's text; `source` names it in messages. Raises UsageError."""
    # Imported here: most verbs need no site file.
    from pydantic import TypeAdapter, ValidationError

    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as failure:
        raise UsageError(f"the site file {source} is not valid TOML: {failure}") from failure
    try:
        for key in ("environment", "profile"):
            if isinstance(table.get(key), str):
                table[key] = _expanded(table[key], key, environment)
        return TypeAdapter(Site).validate_json(json.dumps(table, default=str))
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
            f"{key} = {path!r} begins with ${name}, which is not set here; set it or write the path out"
        )
    path = environment[name] + rest if name else path
    if path and not path.startswith("/"):
        raise UsageError(f"{key} is a whole path, from /, ~ or a variable, and not {path!r}")
    return path


def _fault(kind: str, place: tuple[int | str, ...], message: str, value: object) -> str:
    name = ".".join(str(part) for part in place)
    if kind == "unexpected_keyword_argument":
        known = [key.name for key in fields(Site)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"unknown key {name}{f', did you mean {near[0]}?' if near else ''} (known: {', '.join(known)})"
    return f"{name} = {value!r}: {message[0].lower()}{message[1:]}"
