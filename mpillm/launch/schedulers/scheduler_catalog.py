"""The batch systems: name → object, in the order in which they are looked for."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from mpillm.errors import UsageError
from mpillm.launch.schedulers.batch_system import BatchSystem
from mpillm.system.plugins import is_plugin, load_plugin

SCHEDULERS: Mapping[str, str] = MappingProxyType(
    {
        # Slurm goes first: its packages bring a qsub too, and a Flux instance may run inside a
        # Slurm job, whose end then counts.
        "slurm": "mpillm.launch.schedulers.slurm:SLURM",
        "pbs": "mpillm.launch.schedulers.pbs:PBS",
        "lsf": "mpillm.launch.schedulers.lsf:LSF",
        "flux": "mpillm.launch.schedulers.flux:FLUX",
    }
)
# A job's number goes into commands: `-f` would be an option.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@\[\]-]*", re.ASCII)


def load_scheduler(name: str) -> BatchSystem:
    """Load a batch system of the catalogue, or a plug-in's `package.module:Name`.

    Raises UsageError.
    """
    system = load_plugin(name, SCHEDULERS, "batch system")
    if not isinstance(system, BatchSystem):
        raise UsageError(
            f"the batch system {name} is {system!r}; it must be an object of BatchSystem "
            "or of a class that derives from it"
        )
    return system


def known_systems() -> dict[str, BatchSystem]:
    """Return name → batch system, of the whole catalogue."""
    return {name: load_scheduler(name) for name in SCHEDULERS}


def script_systems() -> dict[str, BatchSystem]:
    """Return name → batch system, of those for which `mpillm submit` writes scripts."""
    return {name: system for name, system in known_systems().items() if system.template}


def check_scheduler(name: str, key: str) -> None:
    """Refuse a `name` that is not auto, a system with scripts or a plug-in. Raises UsageError.

    `key`: the option or key, for the message.
    """
    known = ("auto", *script_systems())
    if name not in known and not is_plugin(name):
        raise UsageError(
            f"{key} is {', '.join(known)}, and not {name!r}; your own is named package.module:Name"
        )


def find_scheduler(name: str, environment: Mapping[str, str]) -> str:
    """Return `name`, or for auto the batch system whose command is on PATH.

    Raises UsageError where there is none.
    """
    check_scheduler(name, "--scheduler")
    if name != "auto":
        return name
    systems = script_systems()
    found = next((known for known in systems if systems[known].find(environment)), None)
    if found is None:
        tried = ", ".join(f"{system.submit[0]} ({system.title})" for system in systems.values())
        raise UsageError(
            f"no batch system is here: none of {tried} is on PATH; submit from a login node, or "
            "name one with --scheduler and --dry-run to see its script"
        )
    return found


def job_state(scheduler: str, job: str, environment: Mapping[str, str]) -> str | None:
    """Ask the batch system for the state of a job, in its own words (PENDING, RUNNING, DONE …).

    Returns None where it does not answer, or cannot be loaded here.
    """
    system = _recorded(scheduler)
    return system.job_state(job, environment) if system and _ID.fullmatch(job) else None


def is_over(scheduler: str, state: str) -> bool:
    """Return whether a job in this state will never run again by itself."""
    system = _recorded(scheduler)
    return system is not None and system.is_over(state)


def _recorded(scheduler: str) -> BatchSystem | None:
    # The name is from a run's record, which another installation may have written.
    try:
        return load_scheduler(scheduler)
    except UsageError:
        return None
